"""What the benchmarks train besides the scripts' own models: something tiny, and something large."""

from benchmarks import harness


def tiny_model(framework, script):
    """Return a `build_model` of one small convolution."""
    if framework == "pytorch":
        nn = script.nn

        def build(args, data):
            layers = [script.Normalize(data), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()]
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    elif framework == "tensorflow":
        keras, layers = script.keras, script.layers

        def build(args, data):
            pixels = keras.Input(data.image_shape, dtype=str(data.train_images.dtype))
            mean, deviation = data.channel_statistics()
            outputs = layers.Normalization(mean=mean, variance=deviation**2, dtype="float32")(pixels)
            outputs = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(outputs)
            return keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling2D()(outputs)))
    else:
        nn = script.nn

        def build(args, data):
            model = nn.HybridSequential(prefix="model_")
            with model.name_scope():
                model.add(script.Normalize(data), nn.Conv2D(8, 3, strides=2, padding=1, activation="relu"))
                model.add(nn.GlobalAvgPool2D(), nn.Flatten(), nn.Dense(10))
            model.initialize(script.mx.init.Xavier())
            model(script.mx.nd.zeros((1, data.image_shape[2], *data.image_shape[:2]))).wait_to_read()
            return model

    return build


def large_model(framework, script, width=2048, depth=3):
    """Return a `build_model` whose weights and momentum are `depth` times 33 MB; a step is as short as it can be."""
    if framework == "pytorch":
        nn = script.nn

        def build(args, data):
            layers = [script.Normalize(data), nn.Flatten(), nn.Linear(64, width)]
            layers += [nn.Linear(width, width) for _ in range(depth)]
            return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 10))
    elif framework == "tensorflow":
        keras, layers = script.keras, script.layers

        def build(args, data):
            pixels = keras.Input(data.image_shape, dtype=str(data.train_images.dtype))
            outputs = layers.Dense(width)(layers.Flatten()(layers.Rescaling(1 / 255)(pixels)))
            for _ in range(depth):
                outputs = layers.Dense(width)(outputs)
            return keras.Model(pixels, layers.Dense(10)(layers.ReLU()(outputs)))
    else:

        def build(args, data):
            model = script.nn.HybridSequential(prefix="model_")
            with model.name_scope():
                model.add(script.Normalize(data), script.nn.Flatten())
                for _ in range(1 + depth):
                    model.add(script.nn.Dense(width))
                model.add(script.nn.Activation("relu"), script.nn.Dense(10))
            model.initialize(script.mx.init.Xavier())
            model(script.mx.nd.zeros((1, 1, 8, 8))).wait_to_read()
            return model

    return build


def deep_trees(folder, rounds):
    """Write a table in `folder` and return the flags with which as many rounds give deep trees, 0.4 MB each."""
    harness.write_table(folder, 50_000, 5)
    flags = ["--train", folder, "--objective", "reg:squarederror", "--max-depth", 0, "--min-child-weight", 0]
    return [*map(str, flags), "--num-round", str(rounds), "--eta", "0.02"]  # so slow that each tree has much to learn
