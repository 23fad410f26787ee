"""Cost of the input: samples per second, relative to training on one cached batch.

Real input is shuffled, cropped, mirrored and normalised from memory, 32 x 32 x 3 in batches of 128. Epochs of
both kinds alternate in one process, with the default model and with a tiny one, a convolution of eight
filters, which shows the cost of the input most clearly.

Reading class folders of JPEG files, from file names to batches of arrays, is compared with decoders that only
decode the same files, in one process per core. The start of these processes is not counted.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import harness, models
from common.batches import BatchLoader
from common.run import Run

SIZES = ((32, 50_000), (256, 5000))  # pixels and number of the JPEG files


def measure(repetitions):
    """Return the figures."""
    figures = []
    for framework in harness.IMAGES:
        for model in ("cnn", "tiny"):
            real, cached = harness.run_json("input", "train", framework, model, repetitions)
            raw = f"{statistics.median(real):,.0f} and {statistics.median(cached):,.0f} samples/s"
            value = harness.ratio(real, cached)
            figures.append(
                harness.Figure(f"{framework}, {model}: real / cached input", value, ">= 0.95", raw)
            )
    for size, number in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(folder, number, size)
            turns = harness.take_turns(
                repetitions,
                ours=lambda: harness.run_json("input", "read", folder),
                pillow=lambda: _on_all_cores("pillow", folder),
                torchvision=lambda: _on_all_cores("torchvision", folder),
            )
        medians = {name: statistics.median(values) for name, values in turns.items()}
        for other in ("pillow", "torchvision"):
            raw = f"{medians['ours']:,.0f} and {medians[other]:,.0f} images/s"
            what = f"JPEG of {size} x {size}: reading / {other} alone"
            figures.append(harness.Figure(what, harness.ratio(turns["ours"], turns[other]), ">= 0.9", raw))
    return figures


def write_jpegs(folder, number, size):
    """Write random squares of the two photos of scikit-learn to ten class folders."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(number):
        path = Path(folder, f"class{index % 10}", f"{index}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = photos[index % 2]
        left, top = (int(generator.integers(0, end - 256)) for end in photo.size)
        photo.crop((left, top, left + 256, top + 256)).resize((size, size)).save(path, quality=90)


def _on_all_cores(decoder, folder):
    """Return the images per second of a bare decoder with one process per core."""
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "benchmarks.input", "decode", decoder, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": harness.ROOT}
    started = [subprocess.Popen([*command, str(part), str(cores)], **pipes) for part in range(cores)]
    for process in started:
        process.stdout.readline()  # it is ready
    for process in started:
        process.stdin.write("begin\n")
        process.stdin.flush()
    return sum(json.loads(process.communicate()[0]) for process in started)


def decode(decoder, folder, part, parts):
    """Return the images per second of a decoder on a part of the files, which are in the page cache."""
    names = sorted(map(str, Path(folder).rglob("*.jpg")))[int(part) :: int(parts)]
    if decoder == "pillow":
        from PIL import Image

        def one(name):
            return np.asarray(Image.open(name))
    else:
        import torch
        from torchvision.io import decode_jpeg, read_file

        torch.set_num_threads(1)

        def one(name):
            return decode_jpeg(read_file(name))

    for name in names[:100]:
        one(name)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for name in names:
        one(name)
    return len(names) / (time.perf_counter() - began)


def read(folder):
    """Return the images per second of `common/images.py` on class folders, in batches of 128."""
    from common import flags, images

    args = flags.image_flags("pytorch").parse_args(["--train", folder])
    names = list(Path(folder).rglob("*.jpg"))
    began = time.perf_counter()
    for dataset in images.load_images(args):
        for part in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // 128)):
            dataset.__getitems__(part)
    return len(names) / (time.perf_counter() - began)


def train(framework, model, repetitions):
    """Return the samples per second of alternating epochs with real input and with a cached batch."""
    script = harness.import_script(framework)
    if model == "tiny":
        script.build_model = models.tiny_model(framework, script)
    load = BatchLoader.__call__
    cache = {}  # by number of samples: the last batches of an epoch may have one sample less

    def load_in_turns(loader, step):
        if loader.augment is None:  # validation
            return load(loader, step)
        epoch = loader.first_step // len(loader.sizes)
        size = len(loader.indices[step])
        if epoch % 2 == 0:
            cache[size] = load(loader, step)
        return cache[size]

    BatchLoader.__call__ = load_in_turns
    Run.save = lambda run: None
    data = harness.write_images("images", 3000 if model == "cnn" else 30_000)
    flags = ["--train", data, "--batch-size", 128]
    flags += ["--epochs", 2 * int(repetitions) + 2, "--log-steps", 0, "--augment", "--checkpoint-seconds", 0]
    args = script.parse_args([*map(str, flags), "--learning-rate", "1e-4"])
    script.main(args)
    rates = harness.history(args, "samples_per_second")[2:]  # the first two epochs are a warm-up
    return rates[::2], rates[1::2]


if __name__ == "__main__":
    harness.print_json(train=train, read=read, decode=decode)
