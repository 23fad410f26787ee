"""Train an image classifier with TensorFlow 1.15 and tf.keras; run the same command again to resume.

Train:      python tensorflow/train_tf1.py
Resume:     python tensorflow/train_tf1.py         (the newest checkpoint is found and continued)
SageMaker:  TensorFlow(entry_point="train_tf1.py", source_dir="tensorflow", framework_version="1.15.5",
                       py_version="py37", checkpoint_s3_uri="s3://...", ...)

This file needs no other file. It saves a checkpoint after every epoch: an interrupted training continues
after its last finished epoch and ends with the same bits. With TensorFlow 2 use `train.py`, which also
resumes inside an epoch.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import numpy as np
import tensorflow as tf

tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)

TEMPORARY = ".sagemaker-ignore"  # SageMaker does not upload files with this ending
DIGEST = hashlib.sha256().digest_size


def parse_args():
    """Return the flags; their defaults on SageMaker are its folders."""
    env = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=int, default=8, help="epochs in total, before and after interruptions")
    add("--batch-size", type=int, default=64)
    add("--learning-rate", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add(
        "--train", default=env("SM_CHANNEL_TRAIN"), help="x (images) and y (labels) in an .npz, or its folder"
    )
    add("--validation", default=env("SM_CHANNEL_VALIDATION"), help="the same; default: a tenth of --train")
    add("--output", default="output/tensorflow-tf1", help="folder of all output")
    add("--checkpoint-path", default="/opt/ml/checkpoints" if env("SM_MODEL_DIR") else None)
    add(
        "--model-dir",
        "--model_dir",
        help="folder of the SavedModel; an S3 address, from SageMaker, is not used",
    )
    add("--output-data-dir", default=env("SM_OUTPUT_DATA_DIR"), help="folder of metrics.json")
    args = parser.parse_args()
    if not args.model_dir or args.model_dir.startswith("s3://"):
        args.model_dir = env("SM_MODEL_DIR", f"{args.output}/model")
    args.checkpoint_path = Path(args.checkpoint_path or f"{args.output}/checkpoints")
    args.output_data_dir = Path(args.output_data_dir or f"{args.output}/data")
    return args


# Make it yours: replace the bodies of the next two functions.


def load_data(args):
    """Return the training and the validation data, each as (images, labels)."""
    if args.train:
        images, labels = read_npz(args.train)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images[..., np.newaxis] / 16
        labels = digits.target
    if args.validation:
        return (images, labels), read_npz(args.validation)
    order = np.random.RandomState(args.seed).permutation(len(images))
    validation, training = np.split(order, [len(images) // 10])
    return [(images[part], labels[part]) for part in (training, validation)]


def build_model(args, images, labels):
    """Return the compiled network. Give each initializer a seed, and use the `Dropout` below."""
    layers = tf.keras.layers
    outputs = inputs = layers.Input(images.shape[1:])
    for filters in (32, 64):
        initializer = tf.keras.initializers.he_uniform(args.seed + filters)
        outputs = layers.Conv2D(filters, 3, padding="same", kernel_initializer=initializer)(outputs)
        outputs = layers.BatchNormalization(momentum=0.9)(outputs)
        outputs = layers.ReLU()(outputs)
        outputs = layers.MaxPooling2D(2)(outputs)
    outputs = layers.GlobalAveragePooling2D()(outputs)
    outputs = Dropout(0.25, args.seed)(outputs)
    initializer = tf.keras.initializers.glorot_uniform(args.seed)
    outputs = layers.Dense(labels.max() + 1, "softmax", kernel_initializer=initializer)(outputs)
    model = tf.keras.Model(inputs, outputs)
    optimizer = tf.keras.optimizers.SGD(args.learning_rate, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", ["accuracy"])
    return model


def read_npz(path):
    """Return the images, in the range 0 to 1 if they are bytes, and the labels in an .npz file."""
    files = [path]
    if os.path.isdir(path):
        files = sorted(Path(path).glob("*.npz"))
    if len(files) != 1:
        raise SystemExit(f"error: {path} has {len(files)} .npz files: expected one")
    with np.load(files[0]) as arrays:
        images = arrays["x"]
        labels = arrays["y"].ravel()
    if images.dtype == np.uint8:
        images = images / 255
    return images, labels


class Dropout(tf.keras.layers.Layer):
    """Dropout whose random numbers follow from the seed and the number of batches, which checkpoints hold.

    The random numbers of tf.keras.layers.Dropout start again in each session, and so after an interruption.
    """

    def __init__(self, rate, seed=0, **options):
        super().__init__(**options)
        self.rate = rate
        self.seed = seed

    def get_config(self):
        """Return the arguments, for load_model(..., custom_objects={"Dropout": Dropout})."""
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}

    def build(self, input_shape):
        """Make the counter of batches, a weight."""
        self.step = self.add_weight("step", (), tf.int32, tf.zeros_initializer(), trainable=False)

    def call(self, inputs, training=None):
        """Return the inputs; while training, without some of them."""

        def drop():
            step = self.step.assign_add(1, read_value=True)
            seed = tf.stack([self.seed, step])
            random = tf.random.stateless_uniform(tf.shape(inputs), seed)
            kept = tf.cast(random >= self.rate, inputs.dtype)
            return inputs * kept / (1 - self.rate)

        return tf.keras.backend.in_train_phase(drop, inputs, training)


class EachEpoch(tf.keras.callbacks.Callback):
    """Seeds an epoch; prints its metrics and saves a checkpoint after it."""

    def __init__(self, args):
        super().__init__()
        self.args = args

    def on_epoch_begin(self, epoch, logs=None):
        """Seed NumPy, with which `fit` shuffles: the order of an epoch is independent of interruptions."""
        np.random.seed([self.args.seed, epoch])
        self.started = time.time()

    def on_epoch_end(self, epoch, logs=None):
        """Save the checkpoint, then print the line of the epoch."""
        save_checkpoint(self.model, self.args.checkpoint_path / f"checkpoint-{epoch + 1}.h5")
        line = f"train_loss={logs['loss']:.4f} train_accuracy={logs['acc']:.4f}"
        line += f" validation_loss={logs['val_loss']:.4f} validation_accuracy={logs['val_acc']:.4f}"
        print(f"epoch={epoch + 1} {line} seconds={time.time() - self.started:.2f}", flush=True)


def save_checkpoint(model, path):
    """Write the model and its optimizer as Keras does, and a checksum behind them, which HDF5 ignores.

    The file gets its name when it is complete.
    """
    draft = path.with_name(path.name + TEMPORARY)
    model.save(str(draft), save_format="h5")
    with open(draft, "r+b") as file:
        content = file.read()
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def load_checkpoint(model, path):
    """Restore a checkpoint. Raises ValueError or OSError if it is damaged. Nothing in it is executed."""
    content = path.read_bytes()
    digest = content[-DIGEST:]
    if hashlib.sha256(content[:-DIGEST]).digest() != digest:
        raise ValueError("its checksum is wrong")
    model.load_weights(str(path))
    with h5py.File(str(path), "r") as file:
        group = file["optimizer_weights"]
        values = [group[name][()] for name in group.attrs["weight_names"]]
    model._make_train_function()  # makes the variables of the optimizer
    model.optimizer.set_weights(values)


def resume(model, folder):
    """Restore the newest checkpoint that is not damaged; return the number of finished epochs."""
    found = {}
    for path in folder.glob("checkpoint-*.h5"):
        match = re.fullmatch(r"checkpoint-(\d+)\.h5", path.name)
        if match:
            epoch = int(match[1])
            found[epoch] = path
    for epoch in sorted(found, reverse=True):
        try:
            load_checkpoint(model, found[epoch])
        except (OSError, ValueError) as error:
            print(f"Damaged, not used: {found[epoch]} ({error})")
        else:
            print(f"Resuming from {found[epoch]}")
            return epoch
    return 0


def export_model(model, folder):
    """Write the SavedModel that TensorFlow Serving expects, in the folder of its version."""
    draft = Path(folder, "1" + TEMPORARY)
    shutil.rmtree(draft, ignore_errors=True)
    session = tf.keras.backend.get_session()
    tensors = {"images": model.input}, {"probabilities": model.output}
    tf.compat.v1.saved_model.simple_save(session, str(draft), *tensors)
    shutil.rmtree(Path(folder, "1"), ignore_errors=True)
    draft.rename(Path(folder, "1"))


def stop(number, frame):
    """End after SIGTERM or Ctrl-C; a checkpoint that is being written has not got its name yet."""
    os.write(1, b"Interrupted: run the same command to resume after the last finished epoch\n")
    os._exit(128 + number)


def main():
    """Train to --epochs in total."""
    args = parse_args()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    training, validation = load_data(args)
    print(f"Data: {len(training[0])} training and {len(validation[0])} validation images")
    model = build_model(args, *training)
    initial_epoch = resume(model, args.checkpoint_path)
    print(f"Starting training from epoch: {initial_epoch + 1}", flush=True)
    args.checkpoint_path.mkdir(parents=True, exist_ok=True)
    model.fit(
        *training,
        batch_size=args.batch_size,
        epochs=args.epochs,
        initial_epoch=initial_epoch,
        validation_data=validation,
        callbacks=[EachEpoch(args)],
        verbose=0,
    )
    loss, accuracy = model.evaluate(*validation, verbose=0)
    metrics = {
        "epochs": args.epochs,
        "validation_loss": float(loss),
        "validation_accuracy": float(accuracy),
    }
    args.output_data_dir.mkdir(parents=True, exist_ok=True)
    (args.output_data_dir / "metrics.json").write_text(json.dumps(metrics))
    export_model(model, args.model_dir)


if __name__ == "__main__":
    main()
