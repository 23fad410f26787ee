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
import socket

import numpy as np

from common import checkpoints, cluster, errors, files, flags, images, interruption, report, saving, script, steps
from common.progress import Progress, mean_metrics

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
    errors.check_device(args, "TensorFlow", gpus)
    gpus = gpus[: max(1, args.batch_size // 2 // cluster.size)]  # each needs a sample, and a batch may be half full
    tf.config.set_visible_devices(gpus, "GPU")
    if args.deterministic:
        tf.config.experimental.enable_op_determinism()
    report.log_device(args, f"{len(gpus)} GPU" if gpus else "cpu")
    if cluster.size > 1:
        return connect_workers(len(gpus))
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def connect_workers(num_gpus):
    """Start TensorFlow's own engine, which sums gradients over all workers; each of them has `num_gpus` GPUs."""
    with socket.create_server((cluster.address, 0)) as free:
        workers = cluster.gather(f"{cluster.address}:{free.getsockname()[1]}")
    cluster.check_same({"number of GPUs (--num-gpus)": num_gpus})
    config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": cluster.rank}}
    os.environ["TF_CONFIG"] = json.dumps(config)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    interruption.install()  # again: TensorFlow has taken over SIGTERM
    return strategy


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
            options = {"input_shape": (height, width, 3), "classes": num_classes, "classifier_activation": None}
            if "include_preprocessing" in inspect.signature(build).parameters:
                options["include_preprocessing"] = False
            elif args.model.startswith("EfficientNet"):
                outputs = layers.Rescaling(255.0)(outputs)  # the network itself divides by it
            outputs = layers.Activation("linear", dtype="float32")(build(weights=None, **options)(outputs))
    except ValueError as error:
        raise errors.unfit_images(args, data, error) from error
    return keras.Model(pixels, outputs)


def compile_model(args, data):
    """Return the network with its optimizer, in the precision that `--precision` asks for."""
    keras.config.set_dtype_policy({"bf16": "mixed_bfloat16", "fp16": "mixed_float16"}.get(args.precision, "float32"))
    model = build_model(args, data)
    model.compile(keras.optimizers.SGD(args.learning_rate, args.momentum, weight_decay=args.weight_decay or None))
    model.optimizer.build(model.trainable_variables)  # before that there is nothing to load its state into
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state, but for what follows from (seed, epoch, step) anyway.
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args, data, model, progress):
    """Copy the training state and write it in the background, unless its file is there; return the file's name."""
    path = args.checkpoint_path / checkpoints.name_of(CHECKPOINT, progress)
    described = progress.describe()  # by all workers
    if saving.is_wanted(path):
        checkpoint = {"progress": described, **describe_run(args, data, model)}
        # No copies yet: while they are held here, TensorFlow copies what a step is about to change.
        arrays = {f"{i}": tf.convert_to_tensor(variable) for i, variable in enumerate(state_of(model))}
        best = progress.best_epoch()
        # Not Keras's own archive, which is made in memory, and of which much is read several times.
        checkpoints.write(args, CHECKPOINT, path, best, lambda file: files.write_arrays(file, arrays, checkpoint))
    return path.name


def state_of(model):
    """Return all variables that a training changes, those of the optimizer too."""
    return [*model.variables, *model.optimizer.variables]


def describe_run(args, data, model):
    """Return what the next run compares itself with."""
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.environ.get("TF_NUM_INTRAOP_THREADS")
    return checkpoints.describe_run(args, data.describe_job(args, model.optimizer), tf, threads)


def load_checkpoint(args, data, model):
    """Restore the newest checkpoint and return its Progress: that of a fresh start where there is none."""
    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read_checkpoint)
    if found is None:
        return Progress()
    path, (arrays, checkpoint) = found
    checkpoints.check_same_job(args, path, checkpoint, describe_run(args, data, model))
    load_arrays(path, arrays, model)
    return Progress.restore(checkpoint["progress"])


def read_checkpoint(file):
    """Return what `save_checkpoint` has written: the arrays, and the dictionary; nothing in the file is executed."""
    return files.read_arrays(file)


def load_arrays(path, arrays, model):
    """Put the arrays of the checkpoint at `path` into the model and its optimizer."""
    with checkpoints.restoring(path):
        for i, variable in enumerate(state_of(model)):
            variable.assign(arrays.pop(f"{i}"))
        if arrays:
            raise ValueError(f"the checkpoint has {len(arrays)} arrays more")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, data, model, strategy):
    """Train up to `--epochs` in total and return the Progress; a signal ends it after a step, with a checkpoint."""
    progress = load_checkpoint(args, data, model)
    training_step, validation_step = compile_steps(args, data, model, strategy)
    report.log_start(progress, args.epochs)
    interruption.defer()
    try:
        while progress.epoch < args.epochs:
            metrics = train_epoch(args, data, model, training_step, progress)
            progress.finish_epoch(metrics, evaluate(args, data, model, validation_step))
            save_checkpoint(args, data, model, progress)
    except interruption.Interrupted as interrupted:
        interrupted.saved = save_checkpoint(args, data, model, progress)
        raise
    return progress


def train_epoch(args, data, model, training_step, progress):
    """Train the rest of the epoch that `progress` is in; return the metrics of the whole epoch."""
    steps_per_epoch = steps.steps_per_epoch(len(data.train_labels), args.batch_size)
    batches = steps.training_batches(data.train_images, data.train_labels, args, progress.epoch + 1, progress.step)
    progress.start_clock()
    for pixels, labels, batch_size in report.progress_bar(args, progress, steps_per_epoch, batches):
        interruption.check()
        step = progress.epoch * steps_per_epoch + progress.step
        learning_rate = steps.learning_rate(args, step, args.epochs * steps_per_epoch)
        loss, hits = training_step(pixels, labels, batch_size, learning_rate, steps.step_seed(args.seed, step))
        progress.count_step(batch_size, loss, hits)
        if progress.step < steps_per_epoch and progress.save_is_due(args, progress.step):
            save_checkpoint(args, data, model, progress)
    return progress.training_metrics()


def evaluate(args, data, model, validation_step):
    """Return loss and accuracy over all validation samples, each counted once."""
    for state in model.non_trainable_variables:  # of batch normalisation the leader's statistics count
        state.assign(np.frombuffer(cluster.broadcast(state.numpy().tobytes()), state.dtype).reshape(state.shape))
    loss_sum = correct = 0
    for pixels, labels in steps.validation_batches(data.validation_images, data.validation_labels, args):
        interruption.check()
        loss, hits = validation_step(pixels, labels)
        loss_sum, correct = loss_sum + loss, correct + hits
    return mean_metrics(loss_sum, correct, len(data.validation_labels))


def compile_steps(args, data, model, strategy):
    """Return a training and a validation step of this worker: functions that return summed loss and number of hits."""
    num_gpus = strategy.num_replicas_in_sync // cluster.size  # of this worker; each is a replica of the strategy
    numbers = strategy.experimental_distribute_values_from_function(lambda gpu: gpu.replica_id_in_sync_group % num_gpus)
    seed_states = [variable for variable in model.variables if "seed_generator_state" in variable.path]  # of dropout

    def forward(gpu, pixels, labels, training=False):
        if num_gpus > 1:
            first, end = tf.size(labels) * gpu // num_gpus, tf.size(labels) * (gpu + 1) // num_gpus
            with tf.device("CPU:0"):  # a GPU gets its part only
                pixels, labels = pixels[first:end], labels[first:end]
        logits = tf.cast(model(pixels, training=training), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(losses), tf.math.count_nonzero(tf.argmax(logits, 1) == labels)

    def train_step(gpu, pixels, labels, batch_size, learning_rate, seed):
        model.optimizer.learning_rate.assign(learning_rate)
        for state in seed_states:
            state.assign([state[0], seed + gpu * 2**20])  # a layer may draw several times in a step
        with tf.GradientTape() as tape:
            loss, hits = forward(gpu, pixels, labels, training=True)
            layers_losses = sum(model.losses) / strategy.num_replicas_in_sync  # such as those of regularizers
            scaled_loss = model.optimizer.scale_loss(loss / batch_size + layers_losses)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        if args.precision == "fp16":  # an overflow on one replica makes all of them skip the step
            overflow = tf.add_n([tf.reduce_sum(0 * gradient) for gradient in gradients])  # 0, or else not a number
            overflow = tf.distribute.get_replica_context().all_reduce("SUM", overflow)
            gradients = [gradient + overflow for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)  # adds them up over all replicas
        return loss, hits

    def compiled(step, *scalars):
        def run(*inputs):
            return [tf.add_n(strategy.experimental_local_results(x)) for x in strategy.run(step, (numbers, *inputs))]

        batch = [tf.TensorSpec([None, *data.image_shape], data.train_images.dtype), tf.TensorSpec([None], tf.int64)]
        batch += [tf.TensorSpec([], dtype) for dtype in scalars]
        return tf.function(run, batch, autograph=False, jit_compile=args.compile or None)

    return compiled(train_step, tf.float32, tf.float32, tf.int64), compiled(forward)


def export_model(args, data, model, progress):
    """Write `1/`, a SavedModel, for SageMaker's TensorFlow serving container."""
    if args.keep_best:
        path, (arrays, _) = checkpoints.read_best_checkpoint(args, CHECKPOINT, progress.best_epoch(), read_checkpoint)
        load_arrays(path, arrays, model)
    for state in (variable for variable in model.variables if "seed_generator_state" in variable.path):
        state.assign([state[0], 0])  # what the last step left there is not part of the model
    try:
        with files.atomic_export(args.model_dir) as folder:
            model.export(folder / "1", verbose=False)
    except tf.errors.OpError as error:
        raise errors.UserError(f"cannot write the model to --model-dir {args.model_dir}: {error.message}") from error
    report.log(f"Model: {args.model_dir / '1'}")


def main(args):
    """Train and write the model and its metrics."""
    cluster.join(args)
    files.prepare_folders(args)
    checkpoints.prepare_folder(args.checkpoint_path, CHECKPOINT)
    keras.utils.set_random_seed(args.seed)
    strategy = choose_device(args)
    data = load_data(args)
    cluster.check_same(data.describe_content())
    with strategy.scope():
        model = compile_model(args, data)
    progress = train(args, data, model, strategy)
    saving.wait()
    if cluster.leads():
        export_model(args, data, model, progress)
        report.write_results(args, progress, class_names=data.class_names)


if __name__ == "__main__":
    script.run(main, args)
