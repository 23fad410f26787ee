"""The training step, relative to a minimal hand-written loop for the same model and batches.

Samples per second of the fastest epoch, without the first, of the script and of a lean loop, each in a
separate process. The loop has batches prepared in advance, no metrics, signals, checkpoints or exactness, and
the framework's own threads. If a framework has several loops, one trial selects the fastest. The TensorFlow
script is also compared with plain Keras: `fit` on arrays, with the same `build_model` and `compile_model`.
The speed of a shared machine changes from run to run, so the processor time of a step is compared, too: the
least of all epochs, with one thread. The model is the default one, in fp32 with a batch size of 128, on
images of 32 x 32 x 3 and 8 x 8 x 1. XGBoost: all rounds, including the first, on 100,000 rows of 30 columns,
without callbacks.
"""

import os
import statistics
import tempfile
import time

import numpy as np

from benchmarks import harness
from common.datasets import Data
from common.run import Run

SHAPES = {"32 x 32 x 3": ((3840, 32, 32, 3), 3), "8 x 8 x 1": ((15_360, 8, 8, 1), 6)}  # images, epochs
BATCH = 128
VARIANTS = {
    "pytorch": ("channels_last", "contiguous"),
    "tensorflow": ("graph", "xla"),
    "mxnet": ("static", "dynamic"),
    "xgboost": ("plain",),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


def measure(repetitions):
    """Yield the figures."""
    for framework in harness.IMAGES:
        for name, (shape, epochs) in SHAPES.items():
            with tempfile.TemporaryDirectory() as folder:
                generator = np.random.default_rng(0)
                labels = generator.integers(0, 10, shape[0])
                images = generator.integers(0, 256, shape, dtype=np.uint8)
                np.savez(f"{folder}/images.npz", x=images, y=labels)
                flags = ["--train", folder, "--validation", folder, "--batch-size", BATCH, "--epochs", epochs]
                flags += ["--checkpoint-seconds", 0]
                yield from _compare(f"{framework}, {name}", framework, [name], flags, repetitions)
    with tempfile.TemporaryDirectory() as folder:
        data = harness.write_table(folder, 100_000, 30)
        flags = ["--train", data, "--validation", data, "--num-round", 60, "--checkpoint-steps", 60]
        yield from _compare("xgboost", "xgboost", [data], flags, repetitions)


def _compare(label, framework, words, flags, repetitions):
    def script():
        rates = harness.rates(harness.run_script(framework, *flags))
        return statistics.harmonic_mean(rates) if framework == "xgboost" else max(rates[1:])

    def other(variant):
        return harness.run_json("step", framework, *words, variant)["rate"]

    def processor_time(*words):
        return harness.run_json("step", *words, env=ONE_THREAD)["ms"]

    leanest = max(VARIANTS[framework], key=other)
    others = {"lean loop": leanest}
    limits = {"lean loop": ">= 0.97"}
    if framework == "tensorflow":  # the script calls `fit`, too
        others["plain fit"] = "fit"
        limits = {"plain fit": ">= 0.97"}
    variants = {name: lambda variant=variant: other(variant) for name, variant in others.items()}
    turns = harness.take_turns(repetitions, ours=script, **variants)
    ours = statistics.median(turns["ours"])
    for name, variant in others.items():
        raw = f"{ours:,.0f} and {statistics.median(turns[name]):,.0f} samples/s ({variant})"
        ratio = harness.ratio(turns["ours"], turns[name])
        yield harness.Figure(f"{label}: script / {name}", ratio, limits.get(name, ""), raw)
    variants = {
        name: lambda variant=variant: processor_time(framework, *words, variant)
        for name, variant in others.items()
    }
    turns = harness.take_turns(
        min(repetitions, 2), ours=lambda: processor_time("steps", framework, *flags), **variants
    )
    for name in others:
        ours, lean = min(turns["ours"]), min(turns[name])
        what = f"{label}: processor time of a step, script / {name}"
        yield harness.Figure(what, ours / lean, "", f"{ours:.2f} and {lean:.2f} ms, with one thread")


def steps(framework, *flags):
    """Train with the script; return the milliseconds of processor time per step of the best epoch."""
    script = harness.import_script(framework)
    name = "finish_round" if framework == "xgboost" else "finish_step"
    finish = getattr(Run, name)
    ends = {}  # of the steps, by epoch

    def timed(run, *arguments):
        epoch = 0 if framework == "xgboost" else run.progress.epoch
        result = finish(run, *arguments)
        if not run._is_validating:
            ends.setdefault(epoch, []).append(time.process_time())
        return result

    setattr(Run, name, timed)
    script.main(script.parse_args(list(flags)))
    first, *later = ((times[-1] - times[0]) / (len(times) - 1) for times in ends.values())
    return {"ms": 1000 * min(later or [first])}


def _batches(name):
    shape, epochs = SHAPES[name]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = generator.integers(0, 10, shape[0])
    return [(pixels[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, shape[0], BATCH)], epochs


def _clocks():
    """Return the time and the processor time of this process in seconds."""
    return time.perf_counter(), time.process_time()


def _fastest(epoch, batches, epochs):
    """Return the result of the function `epoch`, which trains with all batches, as that of `_best`."""
    seconds = []
    for _ in range(epochs):
        began = _clocks()
        epoch()
        seconds.append(np.subtract(_clocks(), began))
    return _best(seconds, len(batches))


def _best(seconds, num_steps):
    """Return the best samples per second, and milliseconds of processor time per step, after the first epoch.

    Args:
        seconds: (n, 2) as the differences of `_clocks`, for each epoch.
    """
    fastest, least = np.min(seconds[1:], axis=0)
    return {"rate": num_steps * BATCH / fastest, "ms": 1000 * least / num_steps}


def pytorch(name, variant):
    """A plain loop."""
    import torch
    from torch import nn

    batches, epochs = _batches(name)
    batches = [(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y)) for x, y in batches]
    channels = batches[0][0].shape[1]
    parts = []
    for inputs, filters in ((channels, 32), (32, 64), (64, 128)):
        parts += [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
        parts += [nn.MaxPool2d(2)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, 10))
    if variant == "channels_last":  # the memory layout of the images
        model = model.to(memory_format=torch.channels_last)
    else:
        batches = [(pixels.contiguous(), labels) for pixels, labels in batches]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def epoch():
        for pixels, labels in batches:
            loss = nn.functional.cross_entropy(model((pixels.float() - 127.5) / 73.6), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return _fastest(epoch, batches, epochs)


def tensorflow(name, variant):
    """One compiled function for the whole step, or plain Keras for the variant "fit"."""
    if variant == "fit":
        return _fit(name)
    import keras
    import tensorflow as tf
    from keras import layers

    batches, epochs = _batches(name)
    batches = [(tf.constant(x), tf.constant(y)) for x, y in batches]
    pixels = keras.Input(batches[0][0].shape[1:], dtype="uint8")
    outputs = layers.Rescaling(1 / 73.6, -127.5 / 73.6)(pixels)
    for filters in (32, 64, 128):
        outputs = layers.Conv2D(filters, 3, padding="same", use_bias=False)(outputs)
        outputs = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(outputs)
        outputs = layers.MaxPooling2D(2)(layers.ReLU()(outputs))
    outputs = layers.Dense(10)(layers.Dropout(0.25)(layers.GlobalAveragePooling2D()(outputs)))
    model = keras.Model(pixels, outputs)
    optimizer = keras.optimizers.SGD(0.01, 0.9, weight_decay=5e-4)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False, jit_compile=variant == "xla" or None)
    def step(pixels, labels):
        with tf.GradientTape() as tape:
            logits = model(pixels, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    def epoch():
        for pixels, labels in batches:
            loss = step(pixels, labels)
        float(loss)

    return _fastest(epoch, batches, epochs)


def _fit(name):
    """Return the result of plain Keras: as `_fastest`."""
    script = harness.import_script("tensorflow")
    keras = script.keras

    shape, epochs = SHAPES[name]
    batches, _ = _batches(name)
    pixels, labels = map(np.concatenate, zip(*batches))
    mean, std = np.full((2, shape[3]), [[127.5], [73.6]], np.float32)
    data = Data(None, None, shape[1:], pixels.dtype, list(range(10)), mean, std, (), None)
    args = script.parse_args([])
    model = script.build_model(args, data)
    script.compile_model(args, model, len(batches))
    begins, ends = [], []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: begins.append(_clocks()),
        on_epoch_end=lambda epoch, logs: ends.append(_clocks()),
    )
    model.fit(pixels, labels, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[clock])
    return _best(np.subtract(ends, begins), len(batches))


def mxnet(name, variant):
    """A hybridized network, including normalisation."""
    np.bool = bool
    import mxnet as mx
    from mxnet import autograd, gluon
    from mxnet.gluon import nn

    batches, epochs = _batches(name)
    batches = [(mx.nd.array(x.transpose(0, 3, 1, 2), dtype="uint8"), mx.nd.array(y)) for x, y in batches]
    model = nn.HybridSequential()
    model.add(nn.HybridLambda(lambda F, pixels: (F.cast(pixels, "float32") - 127.5) / 73.6))
    for filters in (32, 64, 128):
        model.add(nn.Conv2D(filters, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
        model.add(nn.MaxPool2D(2))
    model.add(nn.GlobalAvgPool2D(), nn.Flatten(), nn.Dropout(0.25), nn.Dense(10))
    model.initialize(mx.init.Xavier())
    static = variant == "static"
    model.hybridize(static_alloc=static, static_shape=static)
    settings = {"learning_rate": 0.01, "momentum": 0.9, "wd": 5e-4}
    trainer = gluon.Trainer(model.collect_params(), "sgd", settings)
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def epoch():
        for pixels, labels in batches:
            with autograd.record():
                loss = cross_entropy(model(pixels), labels)
            loss.backward()
            trainer.step(BATCH)
        mx.nd.waitall()

    return _fastest(epoch, batches, epochs)


def xgboost(folder, _):
    """`xgb.train` with the same evaluation."""
    import xgboost as xgb

    table = np.loadtxt(f"{folder}/table.csv", delimiter=",", dtype=np.float32)
    matrix = xgb.QuantileDMatrix(table[:, 1:], table[:, 0])
    validation = xgb.QuantileDMatrix(table[:, 1:], table[:, 0], ref=matrix)
    parameters = {"objective": "binary:logistic", "eval_metric": ["logloss", "error"], "tree_method": "hist"}
    parameters |= {"seed": 42, "eta": 0.3, "max_depth": 6}
    began, rounds = _clocks(), 60
    xgb.train(
        parameters, matrix, rounds, evals=[(matrix, "train"), (validation, "validation")], verbose_eval=False
    )
    seconds, processor_seconds = np.subtract(_clocks(), began)
    return {"rate": len(table) * rounds / seconds, "ms": 1000 * processor_seconds / rounds}


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    harness.print_json(steps=steps, pytorch=pytorch, tensorflow=tensorflow, mxnet=mxnet, xgboost=xgboost)
