"""Peak memory: what checkpoints add, in copies of the training state, and what images add, in copies of the data set.

The first is the peak of a training of a model with about 100 MB of weights and momentum that saves after each of three
epochs, minus the peak of the same without checkpoints; the second the peak with 2,000 images of 224 x 224 minus that
with 200, with a tiny network. Last, XGBoost trains with `--external-memory` on a table four times larger than the
memory that it is allowed, by a control group (cgroup), where this machine lets us make one.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.checkpoint import large_model

GROUPS = Path("/sys/fs/cgroup")
ROWS, COLUMNS = 75_000, 4_000  # 1.2 GB as float32


def measure(repetitions):
    """Return the figures."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        few = harness.write_images(Path(folder, "few"), 200, 224)
        many = harness.write_images(Path(folder, "many"), 2000, 224)
        extra = 1800 * 224 * 224 * 3 / 1e6
        for framework in harness.IMAGES:

            def peak(*words, framework=framework):
                return harness.run_json("memory", framework, *words)

            turns = harness.take_turns(
                repetitions,
                saved=lambda: peak("large", "saved"),
                unsaved=lambda: peak("large", "unsaved"),
                many=lambda: peak("tiny", "unsaved", many),
                few=lambda: peak("tiny", "unsaved", few),
            )
            size = turns["saved"][0]["state"]
            peaks = {name: np.median([seen["peak"] for seen in turns[name]]) for name in turns}
            raw = f"{peaks['saved']:.0f} and {peaks['unsaved']:.0f} MB; the state has {size:.0f} MB"
            copies = (peaks["saved"] - peaks["unsaved"]) / size
            figures.append(harness.Figure(f"{framework}: copies of the state", copies, "<= 1.1", raw))
            raw = f"{peaks['many']:.0f} MB with {extra:.0f} MB of images more than {peaks['few']:.0f} MB"
            copies = (peaks["many"] - peaks["few"]) / extra
            figures.append(harness.Figure(f"{framework}: copies of the images", copies, "<= 1.1", raw))
        figures.append(_external_memory(Path(folder)))
    return figures


def _external_memory(folder):
    """Return what the table is larger than the memory under which XGBoost trains on it."""
    what, size = "xgboost: table / allowed memory", ROWS * COLUMNS * 4
    allowed = size // 4
    group = GROUPS / f"benchmark-{os.getpid()}"
    try:
        (GROUPS / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / "memory.max").write_text(str(allowed))
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        return harness.Figure(what, float("nan"), "", f"not measured: no control group can be made here ({error})")
    _write_parquet(folder / "table")
    try:
        flags = ["--train", folder / "table", "--external-memory", "--num-round", 2, "--max-bin", 16]
        command = [sys.executable, str(harness.ROOT / "xgboost/train.py"), *map(str, flags)]

        def enter():
            (group / "cgroup.procs").write_text(str(os.getpid()))

        finished = subprocess.run(
            command, cwd=folder, preexec_fn=enter, capture_output=True, text=True, env={**os.environ, "TMPDIR": folder}
        )
        peak = int((group / "memory.peak").read_text()) / 1e6 if (group / "memory.peak").exists() else float("nan")
    finally:
        group.rmdir()
    ended = "finished" if finished.returncode == 0 else f"ended with {finished.returncode}"
    raw = f"{ended}: {ROWS:,} x {COLUMNS:,} float32, {size / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB"
    raw += f", peak with the disk's cache {peak:.0f} MB"
    return harness.Figure(what, size / allowed if finished.returncode == 0 else 0, ">= 4", raw)


def _write_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    generator = np.random.default_rng(0)
    names = ["label", *(f"column{number}" for number in range(COLUMNS))]
    schema = pyarrow.schema([(name, pyarrow.float32()) for name in names])
    with parquet.ParquetWriter(folder / "table.parquet", schema, use_dictionary=False) as writer:
        for _ in range(ROWS // 1000):
            features = generator.normal(size=(1000, COLUMNS)).astype(np.float32)
            columns = [(features[:, 0] > 0).astype(np.float32), *features.T]
            writer.write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], schema=schema))


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


def main(framework, model, saved, images=None):
    """In a process of its own: train, and print the peak and the size of the state in MB."""
    script = harness.import_script(framework)
    script.build_model = (large_model if model == "large" else tiny_model)(framework, script)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        flags = ["--epochs", "3" if model == "large" else "1", "--log-steps", "0", "--learning-rate", "1e-6"]
        flags += ["--train", images] if images else ["--batch-size", "32"]
        if saved == "unsaved":
            script.save_checkpoint = lambda *_: None
        script.export_model = lambda *_: None
        args = script.parse_args(flags)
        script.main(args)
        files = list(args.checkpoint_path.iterdir())
        size = files[0].stat().st_size / 1e6 if files else 0
        os.chdir("/")
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "state": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
