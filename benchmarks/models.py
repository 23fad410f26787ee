"""Models of the benchmarks besides those of the scripts: a tiny one and a large one."""

import math

from benchmarks import harness


def tiny_model(framework, script):
    """Return a `build_model` with one small convolution."""
    if framework == "pytorch":
        nn = script.nn

        def build(args, data):
            layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    elif framework == "tensorflow":
        keras, layers = script.keras, script.layers

        def build(args, data):
            inputs = keras.Input(data.sample_shape, dtype=str(data.dtype))
            outputs = layers.Normalization(mean=data.mean, variance=data.std**2, dtype="float32")(inputs)
            outputs = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(outputs)
            return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(outputs)))
    else:
        nn = script.nn

        def build(args, data):
            model = nn.HybridSequential()
            model.add(nn.Conv2D(8, 3, strides=2, padding=1, activation="relu"), nn.GlobalAvgPool2D())
            model.add(nn.Flatten(), nn.Dense(10))
            return model

    return build


def large_model(framework, script, width=2048, depth=3):
    """Return a `build_model` with `depth` times 33 MB of weights and momentum, and a short step."""
    if framework == "pytorch":
        nn = script.nn

        def build(args, data):
            layers = [nn.Flatten(), nn.Linear(math.prod(data.sample_shape), width)]
            layers += [nn.Linear(width, width) for _ in range(depth)]
            return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 10))
    elif framework == "tensorflow":
        keras, layers = script.keras, script.layers

        def build(args, data):
            inputs = keras.Input(data.sample_shape, dtype=str(data.dtype))
            outputs = layers.Dense(width)(layers.Flatten()(layers.Rescaling(1 / 255)(inputs)))
            for _ in range(depth):
                outputs = layers.Dense(width)(outputs)
            return keras.Model(inputs, layers.Dense(10)(layers.ReLU()(outputs)))
    else:
        nn = script.nn

        def build(args, data):
            model = nn.HybridSequential()
            model.add(nn.Flatten(), *[nn.Dense(width) for _ in range(1 + depth)])
            model.add(nn.Activation("relu"), nn.Dense(10))
            return model

    return build


def deep_trees(folder, rounds):
    """Write a table in `folder`; return the flags with which each round adds a deep tree of 0.4 MB."""
    harness.write_table(folder, 50_000, 5)
    flags = ["--train", folder, "--objective", "reg:squarederror", "--max-depth", 0, "--min-child-weight", 0]
    return [
        *map(str, flags),
        "--num-round",
        str(rounds),
        "--eta",
        "0.02",
    ]  # so low that each tree has much to learn
