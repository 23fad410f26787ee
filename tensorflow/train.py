"""Train an image classifier with TensorFlow, save a checkpoint after every epoch, and go on from the newest one.

Train:      python tensorflow/train.py
Resume:     python tensorflow/train.py             (the same command: the newest checkpoint is found)
SageMaker:  TensorFlow(entry_point="train.py", source_dir="tensorflow", checkpoint_s3_uri="s3://...", ...)

Reads class folders of images or arrays (--train, --validation); writes checkpoints (--checkpoint-path), the trained
model (--model-dir) and its metrics (--output-data-dir). `--help` lists all flags.
"""

import inspect
import json
import os
import tempfile
import zipfile
from pathlib import Path

from common import checkpoints, errors, files, flags, images, interruption, report, steps
from common.progress import Progress

CHECKPOINT = "checkpoint-{}.keras"  # the number of finished epochs; inside an epoch also that of its finished steps


def parse_args(argv=None):
    """Return the flags of this script."""
    return flags.image_flags("tensorflow").parse_args(argv)


if __name__ == "__main__":
    interruption.install()
    args = parse_args()  # before the slow imports: --help and a misspelt flag answer at once

with errors.framework("TensorFlow", "Install it with: pip install tensorflow"):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else every start tells of missing GPUs
    import keras
    import tensorflow as tf
    from keras import layers


def choose_device(args):
    """Return the strategy that says where to compute; it changes the speed, never which data or how many epochs."""
    gpus = [] if args.device == "cpu" else tf.config.list_physical_devices("GPU")[: args.num_gpus]
    if args.device == "cuda" and not gpus:
        raise errors.UserError("--device cuda: TensorFlow finds no GPU here; use --device auto or cpu")
    if args.precision == "fp16" and not gpus:
        raise errors.UserError("--precision fp16: TensorFlow has it on GPUs only; use --precision bf16 or fp32")
    tf.config.set_visible_devices(gpus, "GPU")
    if args.deterministic:
        tf.config.experimental.enable_op_determinism()
    report.log(f"Device: {f'{len(gpus)} GPU' if gpus else 'cpu'} ({args.precision})")
    policies = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
    keras.mixed_precision.set_dtype_policy(policies[args.precision])
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


# ---------------------------------------------------------------------------------------------------------------------
# Data and model: replace the bodies of these two functions with your own. Nothing else knows what is trained.
# ---------------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return an `images.Dataset`: uint8 or float32 images (n, height, width, channels) and int64 labels (n,)."""
    return images.load_images(args)


def build_model(args, data):
    """Return the network: raw pixels (n, height, width, channels) in, one logit per class (n, classes) out."""
    height, width, channels = data.image_shape
    num_classes = len(data.class_names)
    pixels = keras.Input(data.image_shape, dtype=str(data.train_images.dtype))
    mean, deviation = data.channel_statistics()
    outputs = layers.Normalization(mean=mean, variance=deviation**2, dtype="float32")(pixels)
    try:
        if args.model == "cnn":
            for filters in (32, 64, 128):
                outputs = layers.Conv2D(filters, 3, padding="same", use_bias=False)(outputs)
                outputs = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(outputs)
                outputs = layers.MaxPooling2D(2)(layers.ReLU()(outputs))
            outputs = layers.Dropout(0.25)(layers.GlobalAveragePooling2D()(outputs))
            outputs = layers.Dense(num_classes, dtype="float32")(outputs)
        else:
            names = [name for name in dir(keras.applications) if name[0].isupper()]
            errors.check_choice("--model", args.model, ["cnn", *names])
            if channels == 1:  # the zoo's networks want three: grey is repeated
                outputs = layers.Concatenate()([outputs] * 3)
            build = getattr(keras.applications, args.model)
            options = {"weights": None, "input_shape": (height, width, 3), "classes": num_classes}
            options["classifier_activation"] = None
            if "include_preprocessing" in inspect.signature(build).parameters:
                options["include_preprocessing"] = False
            elif args.model.startswith("EfficientNet"):
                outputs = layers.Rescaling(255.0)(outputs)  # the network itself divides by it
            outputs = layers.Activation("linear", dtype="float32")(build(**options)(outputs))
    except ValueError as error:
        raise errors.unfit_images(args, data, error) from error
    return keras.Model(pixels, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state, but for what follows from (seed, epoch, step) anyway.
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args, data, model, progress):
    """Write the training state, unless its file is there already; return the file's name."""
    path = args.checkpoint_path / checkpoints.name_of(CHECKPOINT, progress)
    if path.exists():
        return path.name
    checkpoint = {
        # The rest of the .keras archive: the model, the optimizer and its loss scaler.
        "progress": progress.describe(),
        **describe_run(args, data, model),
    }
    with files.atomic_write(path) as file, tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "model.keras")
        archive.symlink_to(Path(file.name).resolve())  # Keras takes no name with another ending
        model.save(archive)
        with zipfile.ZipFile(archive, "a") as members:
            members.writestr("checkpoint.json", json.dumps(checkpoint))
    checkpoints.remove_old_checkpoints(args, CHECKPOINT, progress.best_epoch())
    return path.name


def describe_run(args, data, model):
    """Return what the next run compares itself with."""
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.environ.get("TF_NUM_INTRAOP_THREADS")
    return checkpoints.describe_run(args, data.describe_job(args, model.optimizer), tf, threads)


def load_checkpoint(args, data, model):
    """Restore the newest checkpoint and return its Progress: that of a fresh start where there is none."""
    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read_checkpoint)
    if found is None:
        return Progress()
    path, checkpoint = found
    checkpoints.check_same_job(args, path, checkpoint, describe_run(args, data, model))
    with checkpoints.restoring(path):
        model.optimizer.build(model.trainable_variables)  # before that there is nothing to load its state into
        model.load_weights(path)  # the weights and the optimizer's state; nothing in the file is executed
    report.log(f"Resuming training from {path.name}")
    return Progress(**checkpoint["progress"])


def read_checkpoint(path):
    """Return what `save_checkpoint` has written beside the weights; nothing in the file is executed."""
    with zipfile.ZipFile(files.read_zip(path)) as archive:
        return json.loads(archive.read("checkpoint.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, data, model, strategy):
    """Train up to `--epochs` in total and return the Progress; a signal ends it after a step, with a checkpoint."""
    with strategy.scope():
        optimizer = keras.optimizers.SGD(args.learning_rate, args.momentum, weight_decay=args.weight_decay or None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metrics = [keras.metrics.SparseCategoricalCrossentropy("cross_entropy", from_logits=True)]
        metrics += [keras.metrics.SparseCategoricalAccuracy("accuracy")]
        model.compile(optimizer, loss, metrics=metrics)
        if strategy.num_replicas_in_sync > 1:
            # Left to itself, Keras 3.15 fails where the first batch cannot be split evenly over the GPUs.
            model._symbolic_build(data_batch=(data.train_images[:1], data.train_labels[:1]))
            model._maybe_symbolic_build = lambda **_: None
    progress = load_checkpoint(args, data, model)
    report.log_start(progress, args.epochs)
    interruption.defer()
    try:
        while progress.epoch < args.epochs:
            averages = train_epoch(args, data, model, metrics, progress)
            progress.finish_epoch(averages, evaluate(args, data, model))
            save_checkpoint(args, data, model, progress)
    except interruption.Interrupted as interrupted:
        interrupted.saved = save_checkpoint(args, data, model, progress)
        raise
    return progress


def train_epoch(args, data, model, metrics, progress):
    """Train the rest of the epoch that `progress` is in; return the metrics of the whole epoch."""
    steps_per_epoch = steps.steps_per_epoch(len(data.train_labels), args.batch_size)
    epoch, first_step = progress.epoch, progress.step

    def batches():
        return steps.training_batches(data.train_images, data.train_labels, args, epoch + 1, first_step)

    if first_step < steps_per_epoch:
        steps_callback = Steps(args, data, metrics, progress, steps_per_epoch)
        try:
            model.fit(
                make_dataset(data, batches),
                initial_epoch=epoch,
                epochs=epoch + 1,
                steps_per_epoch=steps_per_epoch - first_step,
                callbacks=[steps_callback],
                shuffle=False,
                verbose=0,
            )
        finally:
            steps_callback.bar.close()
            steps_callback.read_metrics()
    return progress.training_metrics()


class Steps(keras.callbacks.Callback):
    """Makes each step a function of (seed, step), and counts it; saves inside an epoch."""

    def __init__(self, args, data, metrics, progress, steps_per_epoch):
        super().__init__()
        self.args, self.data, self.metrics, self.progress = args, data, metrics, progress
        self.bar, self.steps_per_epoch = report.progress_bar(args, progress, steps_per_epoch), steps_per_epoch

    def on_epoch_begin(self, epoch, logs=None):
        for metric, total in zip(self.metrics, (self.progress.loss_sum, self.progress.correct)):
            metric.total.assign(total)
            metric.count.assign(self.progress.samples)
        self.seed_states = seed_states(self.model)
        self.progress.start_clock()

    def on_train_batch_begin(self, batch, logs=None):
        interruption.check()
        step = self.progress.epoch * self.steps_per_epoch + self.progress.step
        for state in self.seed_states:
            state.assign([state[0], steps.step_seed(self.args.seed, step)])
        total_steps = self.args.epochs * self.steps_per_epoch
        self.model.optimizer.learning_rate = steps.learning_rate(self.args, step, total_steps)

    def on_train_batch_end(self, batch, logs=None):
        self.progress.step += 1
        self.bar.update()
        if self.progress.step < self.steps_per_epoch and self.progress.save_is_due(self.args, self.progress.step):
            self.read_metrics()
            save_checkpoint(self.args, self.data, self.model, self.progress)

    def read_metrics(self):
        loss, accuracy = self.metrics
        self.progress.loss_sum, self.progress.correct = float(loss.total), int(accuracy.total)
        self.progress.samples = int(accuracy.count)


def evaluate(args, data, model):
    """Return loss and accuracy over all validation samples, each counted once."""
    batches = make_dataset(data, lambda: steps.validation_batches(data.validation_images, data.validation_labels, args))
    num_steps = steps.steps_per_epoch(len(data.validation_labels), args.batch_size)
    stop = keras.callbacks.LambdaCallback(on_test_batch_begin=lambda batch, logs: interruption.check())
    metrics = model.evaluate(batches, steps=num_steps, callbacks=[stop], verbose=0, return_dict=True)
    return {"loss": metrics["cross_entropy"], "accuracy": metrics["accuracy"]}


def seed_states(model):
    """Return the variables that dropout draws from: two numbers each, the seed and a counter."""
    return [variable for variable in model.variables if "seed_generator_state" in variable.path]


def make_dataset(data, batches):
    """Return the batches that the function `batches` yields as a `tf.data.Dataset`."""
    image_spec = tf.TensorSpec([None, *data.image_shape], data.train_images.dtype)
    label_spec = tf.TensorSpec([None], tf.int64)
    return tf.data.Dataset.from_generator(batches, output_signature=(image_spec, label_spec)).prefetch(2)


def export_model(args, data, model, progress):
    """Write `1/`, a SavedModel, for SageMaker's TensorFlow serving container."""
    if args.keep_best:
        path, _ = checkpoints.read_best_checkpoint(args, CHECKPOINT, progress.best_epoch(), read_checkpoint)
        with checkpoints.restoring(path):
            model.load_weights(path)
    for state in seed_states(model):
        state.assign([state[0], 0])  # what the last step left there is not part of the model
    try:
        with files.atomic_export(args.model_dir) as folder:
            model.export(folder / "1", verbose=False)
    except tf.errors.OpError as error:
        raise errors.UserError(f"cannot write the model to --model-dir {args.model_dir}: {error.message}") from error
    report.log(f"Model: {args.model_dir / '1'}")


def main(args):
    """Train and write the model and its metrics."""
    files.prepare_folders(args)
    checkpoints.prepare_folder(args.checkpoint_path, CHECKPOINT)
    keras.utils.set_random_seed(args.seed)
    strategy = choose_device(args)
    data = load_data(args)
    with strategy.scope():
        model = build_model(args, data)
    progress = train(args, data, model, strategy)
    export_model(args, data, model, progress)
    report.write_results(args, progress, class_names=data.class_names)


if __name__ == "__main__":
    errors.run(main, args)
