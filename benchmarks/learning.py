"""What the scripts learn, beside plain loops of the same frameworks and what people would use instead.

CIFAR-10 as folders of JPEG files, the default network, three epochs of 128 images per batch, learning rate
0.05 with a cosine schedule, random crops and flips; three seeds. A plain loop has the same network,
optimizer, schedule and augmentation, and nothing else: all images are decoded first and stay in memory, there
are no checkpoints, and batches, random numbers and initial weights are its own. XGBoost trains on the digits
that scikit-learn ships, 100 rounds, with rows and columns sampled at random.

The tools that people would use instead read the same files with the same network and write a checkpoint after
every epoch: Lightning with a DataLoader of two processes, torchvision's transforms and ModelCheckpoint; Keras
`fit` with a cached tf.data pipeline and ModelCheckpoint; `xgb.train` with TrainingCheckPoint every ten
rounds, on 100,000 rows of 30 columns. The rate is that of the second of two epochs, or of 200 rounds.

    python -m benchmarks.learning CIFAR_FOLDER    (with the class folders in train/ and test/)
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import harness
from common.datasets import Data
from common.images import random_crop_and_flip

EPOCHS, BATCH, PEAK, DECAY = 3, 128, 0.05, 5e-4
RECIPE = ("--augment", "--batch-size", BATCH, "--learning-rate", PEAK, "--schedule", "cosine")
ROUNDS = ("--num-round", 100, "--subsample", 0.7, "--colsample-bytree", 0.5)
TOOLS = {"pytorch": "lightning", "tensorflow": "fit", "xgboost": "train_with_callback"}
TABLE = (100_000, 30)  # rows and columns


def measure(folder, seeds, parts):
    """Yield the figures of these parts: names of frameworks."""
    for framework in parts:
        ours, plain = [], []
        for seed in range(1, seeds + 1):
            ours.append(_script(framework, folder, seed))
            plain.append(harness.run_json("learning", framework, folder, seed))
        label = f"{framework}: validation accuracy of the script, minus that of the plain loop"
        spread = max(statistics.stdev(run["accuracy"] for run in runs) for runs in (ours, plain))
        detail = f"{_summary(ours)}; plain loop {_summary(plain)}"
        means = [statistics.mean(run["accuracy"] for run in runs) for runs in (ours, plain)]
        yield harness.Figure(label, means[0] - means[1], f">= {-max(spread, 0.001):.4f}", detail)
    for framework in parts:
        if framework in TOOLS:
            yield from _compare(framework, TOOLS[framework], folder, seeds)


def _summary(runs):
    accuracies = [run["accuracy"] for run in runs]
    spread = f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}"
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{spread} in {seconds:.0f} s ({statistics.median(run['rate'] for run in runs):,.0f} samples/s)"


def _compare(framework, tool, folder, repetitions):
    """Yield the speed of a script relative to what people would use instead, and details."""
    with tempfile.TemporaryDirectory() as table:
        if framework == "xgboost":
            folder = harness.write_table(table, *TABLE)
        turns = harness.take_turns(
            repetitions,
            ours=lambda: harness.run_json("learning", "ours", folder, framework, time.time()),
            other=lambda: harness.run_json("learning", tool, folder, time.time()),
        )
    details = []
    for name, runs in turns.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        details.append(
            f"{name} {middle['rate']:,.0f} samples/s, first step after {middle['first_step']:.1f} s, "
            f"a checkpoint stalls {middle['stall']:.1f} ms"
        )
    rates = {name: [run["rate"] for run in runs] for name, runs in turns.items()}
    what = f"{framework}: samples/s, script / {tool.replace('_', ' ')}"
    yield harness.Figure(what, harness.ratio(rates["ours"], rates["other"]), ">= 1", "; ".join(details))


def _script(framework, folder, seed):
    flags = [*ROUNDS, "--seed", seed]
    if framework != "xgboost":
        flags = ["--train", f"{folder}/train", "--validation", f"{folder}/test", *RECIPE]
        flags += ["--epochs", EPOCHS, "--seed", seed]
    began = time.monotonic()
    output = harness.run_script(framework, *flags)
    seconds = time.monotonic() - began
    accuracy = float(output.rsplit(" validation_accuracy=", 1)[1].split()[0])
    return {"accuracy": accuracy, "seconds": seconds, "rate": statistics.median(harness.rates(output))}


# Plain loops ------------------------------------------------------------------------------------------------


def _read(folder):
    """Return the images (n, height, width, channels) and labels (n,) of class folders."""
    from PIL import Image

    classes = sorted(path.name for path in Path(folder).iterdir())
    files = [(path, classes.index(path.parent.name)) for path in sorted(Path(folder).rglob("*.jp*g"))]
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda file: np.asarray(Image.open(file[0])), files))
    return np.stack(images), np.array([label for _, label in files])


class _Recipe:
    """The data and the schedule of a plain loop."""

    def __init__(self, folder, seed):
        self.images, self.labels = _read(f"{folder}/train")
        self.test = _read(f"{folder}/test")
        self.generator = np.random.default_rng(int(seed))
        pixels = self.images.reshape(-1, 3)
        mean, std = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
        classes = list(range(10))
        self.data = Data(
            None, None, (32, 32, 3), self.images.dtype, classes, np.float32(mean), np.float32(std), (), None
        )
        self.num_batches = math.ceil(len(self.images) / BATCH)
        self.step = 0

    def epoch(self):
        """Yield the batches (images, labels, learning rate) of an epoch."""
        for indices in np.array_split(self.generator.permutation(len(self.images)), self.num_batches):
            rate = PEAK * (1 + math.cos(math.pi * self.step / (EPOCHS * self.num_batches))) / 2
            self.step += 1
            yield random_crop_and_flip(self.images[indices], self.generator), self.labels[indices], rate

    def run(self, train, evaluate):
        """Train and evaluate; return the accuracy, and the samples per second."""
        rates = []
        for _ in range(EPOCHS):
            began = time.perf_counter()
            for batch in self.epoch():
                train(*batch)
            evaluate(self.test[0][:1])  # waits for the last step
            rates.append(len(self.images) / (time.perf_counter() - began))
        parts = [evaluate(part) for part in np.array_split(self.test[0], 80)]
        return np.mean(np.concatenate(parts) == self.test[1]), statistics.median(rates)


def pytorch(folder, seed):
    """Return the result of a plain loop of PyTorch."""
    script = harness.import_script("pytorch")
    import torch

    torch.manual_seed(int(seed))
    recipe = _Recipe(folder, seed)
    model = script.build_model(script.parse_args([]), recipe.data)
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=DECAY)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.data.mean, recipe.data.std))

    def normalized(images):
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std

    def train(images, labels, rate):
        model.train()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(normalized(images)), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(images):
        return model.eval()(normalized(images)).argmax(1).numpy()

    return recipe.run(train, evaluate)


def tensorflow(folder, seed):
    """Return the result of a plain loop of TensorFlow: `train_on_batch` of the compiled network."""
    script = harness.import_script("tensorflow")
    keras = script.keras
    keras.utils.set_random_seed(int(seed))
    recipe = _Recipe(folder, seed)
    flags = ["--schedule", "cosine", "--epochs", str(EPOCHS), "--learning-rate", str(PEAK)]
    args = script.parse_args(flags)
    model = script.build_model(args, recipe.data)
    script.compile_model(args, model, recipe.num_batches)

    def train(images, labels, rate):  # the learning rate is that of the schedule
        model.train_on_batch(images, labels)

    return recipe.run(train, lambda images: model(images, training=False).numpy().argmax(1))


def mxnet(folder, seed):
    """Return the result of a plain loop of Gluon."""
    script = harness.import_script("mxnet")
    import mxnet as mx

    mx.random.seed(int(seed))
    recipe = _Recipe(folder, seed)
    model = script.build_model(script.parse_args([]), recipe.data)
    model.hybridize(static_alloc=True)
    settings = {"learning_rate": PEAK, "momentum": 0.9, "wd": DECAY}
    trainer = mx.gluon.Trainer(model.collect_params(), "sgd", settings)
    cross_entropy = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    mean, std = (mx.nd.array(values.reshape(1, 3, 1, 1)) for values in (recipe.data.mean, recipe.data.std))

    def normalized(images):
        return (mx.nd.array(images.transpose(0, 3, 1, 2), dtype="float32") - mean) / std

    def train(images, labels, rate):
        trainer.set_learning_rate(rate)
        with mx.autograd.record():
            loss = cross_entropy(model(normalized(images)), mx.nd.array(labels))
        loss.backward()
        trainer.step(len(labels))

    return recipe.run(train, lambda images: model(normalized(images)).argmax(1).asnumpy())


def xgboost(folder, seed):
    """Return the result of `xgb.train` with the script's parameters."""
    script = harness.import_script("xgboost")
    xgb = script.xgb
    args = script.parse_args([*map(str, ROUNDS), "--seed", str(seed)])
    train, validation = script.load_data(args)
    matrix = xgb.QuantileDMatrix(train.features, train.labels)
    other = xgb.QuantileDMatrix(validation.features, validation.labels, ref=matrix)
    params = {"objective": "multi:softprob", "num_class": 10, "seed": int(seed), "eval_metric": "merror"}
    params |= {"subsample": 0.7, "colsample_bytree": 0.5}
    result = {}
    began = time.perf_counter()
    xgb.train(params, matrix, 100, [(other, "validation")], evals_result=result, verbose_eval=False)
    rate = 100 * len(train.labels) / (time.perf_counter() - began)
    return 1 - result["validation"]["merror"][-1], rate


# What people would use instead ------------------------------------------------------------------------------


class _Clock:
    """The rate of the last epoch, the time of the first step, and the stalls by checkpoints.

    Args:
        began: the time when the process was started.
    """

    def __init__(self, began):
        self.began = float(began)
        self.first_step = None
        self.epoch_began = self.epoch_seconds = 0.0
        self.stalls = []

    def start_epoch(self):
        self.epoch_began = time.perf_counter()

    def finish_epoch(self):
        self.epoch_seconds = time.perf_counter() - self.epoch_began

    def finish_step(self):
        if self.first_step is None:
            self.first_step = time.time() - self.began

    def time_stalls(self, owner, name):
        """Time the calls of a function that saves a checkpoint."""
        save = getattr(owner, name)

        def timed(*args, **options):
            began = time.perf_counter()
            result = save(*args, **options)
            self.stalls.append(1000 * (time.perf_counter() - began))
            return result

        setattr(owner, name, timed)

    def result(self, num_samples):
        rate = num_samples / self.epoch_seconds
        stall = statistics.median(self.stalls)
        return {"rate": rate, "first_step": self.first_step, "stall": stall}


def ours(folder, framework, began):
    """Return the result of a script."""
    clock = _Clock(began)
    script = harness.import_script(framework)
    run = script.Run
    clock.time_stalls(run, "save")
    name = "finish_round" if framework == "xgboost" else "finish_step"
    finish = getattr(run, name)

    def finish_step(*args, **options):
        result = finish(*args, **options)
        clock.finish_step()
        return result

    setattr(run, name, finish_step)
    if framework == "xgboost":
        flags = ["--train", folder, "--validation", folder, "--num-round", "200", "--output", "output"]
    else:
        flags = ["--train", f"{folder}/train", "--validation", f"{folder}/test", *map(str, RECIPE)]
        flags += ["--epochs", "2", "--output", "output"]
    args = script.parse_args(flags)
    script.main(args)
    rates = harness.history(args, "samples_per_second")
    rate = statistics.harmonic_mean(rates) if framework == "xgboost" else rates[-1]
    return {"rate": rate, "first_step": clock.first_step, "stall": statistics.median(clock.stalls)}


def lightning(folder, began):
    """Return the result of Lightning."""
    clock = _Clock(began)
    script = harness.import_script("pytorch")
    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    args = script.parse_args([])
    statistics_of_cifar = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    same = [transforms.ToTensor(), transforms.Normalize(*statistics_of_cifar)]
    changed = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *same]
    train = ImageFolder(f"{folder}/train", transforms.Compose(changed))
    test = ImageFolder(f"{folder}/test", transforms.Compose(same))
    options = {"batch_size": BATCH, "num_workers": 2, "persistent_workers": True}
    data = Data(None, None, (32, 32, 3), None, list(range(10)), None, None, (), None)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = script.build_model(args, data)

        def training_step(self, batch, index):
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.model(images), labels)

        def validation_step(self, batch, index):
            images, labels = batch
            self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), PEAK, momentum=0.9, weight_decay=DECAY)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, 2 * math.ceil(len(train) / BATCH)
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_epoch_start(self):
            clock.start_epoch()

        def on_train_batch_end(self, outputs, batch, index):
            clock.finish_step()
            if index == self.trainer.num_training_batches - 1:
                clock.finish_epoch()

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    clock.time_stalls(trainer, "save_checkpoint")
    trainer.fit(Classifier(), DataLoader(train, shuffle=True, **options), DataLoader(test, **options))
    return clock.result(len(train))


def fit(folder, began):
    """Return the result of Keras `fit`."""
    clock = _Clock(began)
    script = harness.import_script("tensorflow")
    keras = script.keras
    import tensorflow as tf

    def read(name):
        options = {"image_size": (32, 32), "batch_size": None, "shuffle": False, "verbose": False}
        files = keras.utils.image_dataset_from_directory(f"{folder}/{name}", **options)
        return files.map(lambda image, label: (tf.cast(image, tf.uint8), label)).cache()

    def augment(image, label):
        padded = tf.image.pad_to_bounding_box(image, 4, 4, 40, 40)
        return tf.image.random_flip_left_right(tf.image.random_crop(padded, (32, 32, 3))), label

    train, test = read("train"), read("test")
    count = int(train.cardinality())
    parallel = tf.data.AUTOTUNE
    batches = train.shuffle(count).map(augment, parallel).batch(BATCH).prefetch(parallel)
    mean, std = np.float32((125.3, 123.0, 113.9)), np.float32((63.0, 62.1, 66.7))
    data = Data(None, None, (32, 32, 3), np.dtype(np.uint8), list(range(10)), mean, std, (), None)
    flags = ["--schedule", "cosine", "--epochs", "2", "--learning-rate", str(PEAK)]
    args = script.parse_args(flags)
    model = script.build_model(args, data)
    script.compile_model(args, model, math.ceil(count / BATCH))
    clock.time_stalls(model, "save")
    timer = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: clock.start_epoch(),
        on_train_batch_end=lambda batch, logs: clock.finish_step(),
    )
    timer.on_test_begin = lambda logs=None: clock.finish_epoch()
    saver = keras.callbacks.ModelCheckpoint("model-{epoch}.keras")
    validation = test.batch(BATCH).prefetch(parallel)
    model.fit(batches, validation_data=validation, epochs=2, verbose=0, callbacks=[timer, saver])
    return clock.result(count)


def train_with_callback(folder, began):
    """Return the result of `xgb.train` with TrainingCheckPoint."""
    clock = _Clock(began)
    script = harness.import_script("xgboost")
    xgb = script.xgb
    table = np.loadtxt(f"{folder}/table.csv", delimiter=",", dtype=np.float32)
    matrix = xgb.QuantileDMatrix(table[:, 1:], table[:, 0])
    validation = xgb.QuantileDMatrix(table[:, 1:], table[:, 0], ref=matrix)
    params = {"objective": "binary:logistic", "eval_metric": ["logloss", "error"]}
    saver = xgb.callback.TrainingCheckPoint(".", interval=10)
    clock.time_stalls(xgb.Booster, "save_model")

    class Timer(xgb.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            clock.finish_step()

    clock.start_epoch()
    evals = [(matrix, "train"), (validation, "validation")]
    xgb.train(params, matrix, 200, evals, callbacks=[saver, Timer()], verbose_eval=False)
    clock.finish_epoch()
    return clock.result(200 * len(table))


def plain(function):
    """Return a part of the benchmark: `function` with its time."""

    def part(folder, seed):
        began = time.monotonic()
        accuracy, rate = function(folder, seed)
        return {"accuracy": float(accuracy), "seconds": time.monotonic() - began, "rate": rate}

    return part


def main():
    """Measure the named frameworks, or all, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", help="CIFAR-10 as class folders in train/ and test/")
    parser.add_argument("--seeds", type=int, default=3, help="at least two; default: 3")
    parser.add_argument("--parts", nargs="+", choices=harness.FRAMEWORKS, default=harness.FRAMEWORKS)
    args = parser.parse_args()
    figures = []
    for figure in measure(Path(args.folder).resolve(), args.seeds, args.parts):
        figures.append(figure)
        print(f"{figure.what}: {figure.value:.4f} {figure.limit} ({figure.detail})", flush=True)
        harness.write_results("learning", __doc__, figures, args.seeds)
    harness.write_report(harness.NAMES)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parts = {function.__name__: plain(function) for function in (pytorch, tensorflow, mxnet, xgboost)}
    parts.update({function.__name__: function for function in (ours, lightning, fit, train_with_callback)})
    if sys.argv[1:2] and sys.argv[1] in parts:
        harness.print_json(**parts)
    else:
        main()
