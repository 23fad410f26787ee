"""Train an image classifier with TensorFlow; run the same command again to resume.

Train:      python tensorflow/train.py
Resume:     python tensorflow/train.py             (the newest checkpoint is found and continued)
SageMaker:  TensorFlow(entry_point="train.py", source_dir="tensorflow", checkpoint_s3_uri="s3://...", ...)

Writes below --output: a checkpoint after every epoch, the trained model, and its metrics. `--help` lists all
flags.
"""

from common import flags
from common.images import load_images, random_crop_and_flip
from common.run import Run, execute, start


def parse_args(argv=None):
    """Return the flags of this script. Add your own to the parser."""
    parser = flags.image_flags("tensorflow")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = start(parse_args)  # before the slow imports: --help and a misspelt flag answer at once

import engine
import keras
from keras import layers
from keras.optimizers import schedules
from records import RecordFile

# ------------------------------------------------------------------------------------------------------------
# Make it yours: replace the bodies of these functions. Nothing below this section knows what is trained.
# ------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return the training and the validation data set, which have `__len__` and (image, label) by index.

    Images of uint8 are normalized for the network; samples of other types reach it unchanged. Random
    transforms are fine: they are seeded for each sample, so that they do not depend on interruptions.

    The validation data set may also be a tf.data.Dataset of batches (images, labels), and the training data
    set a function (epoch, first_step), with an attribute `classes`, that returns one: the batches of that
    epoch from `first_step` on. Its order and random numbers must follow from the epoch: instead of
    Dataset.shuffle use tf.random.experimental.stateless_shuffle and tf.image.stateless_* with seeds such as
    (args.seed, epoch).
    """
    return load_images(args, RecordFile)


def augment(images, labels, rng):
    """Return a training batch with random changes; called with --augment.

    Take random numbers from `rng` only. Images are arrays (n, height, width, channels), labels are (n, ...).
    Only the images change here: if your labels are masks or boxes, change them alike.
    """
    return random_crop_and_flip(images, rng), labels


def build_model(args, data):
    """Return the network: images (n, height, width, channels) in, one logit per class (n, classes) out."""
    inputs = keras.Input(data.sample_shape, dtype=str(data.dtype))
    outputs = inputs
    if data.mean is not None:  # images of uint8
        outputs = layers.Normalization(mean=data.mean, variance=data.std**2, dtype="float32")(outputs)
    if args.model != "cnn":
        return keras.Model(inputs, engine.zoo_model(args.model, data, outputs))

    def uniform():  # within 1 / sqrt(fan_in), as in PyTorch: the network learns faster than by default
        return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")

    for filters in (32, 64, 128):
        convolution = layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_initializer=uniform())
        outputs = convolution(outputs)
        outputs = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(outputs)
        outputs = layers.ReLU()(outputs)
        outputs = layers.MaxPooling2D(2)(outputs)
    outputs = layers.GlobalAveragePooling2D()(outputs)
    outputs = layers.Dropout(0.25)(outputs)
    outputs = layers.Dense(data.num_classes, dtype="float32", kernel_initializer=uniform())(outputs)
    return keras.Model(inputs, outputs)


def compile_model(args, model, steps_per_epoch):
    """Set the optimizer, the loss and the metrics of the network.

    The loss is for training only. The log shows the metric named "loss" instead, so that label smoothing
    in the training does not affect the validation loss.
    """
    learning_rate = learning_rate_schedule(args, steps_per_epoch)
    if args.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=args.weight_decay)
    else:
        momentum = 0.9
        # Keras applies the decay once, without the momentum, which would multiply it by 1 / (1 - momentum).
        weight_decay = args.weight_decay / (1 - momentum) or None
        optimizer = keras.optimizers.SGD(learning_rate, momentum, weight_decay=weight_decay)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy("loss", from_logits=True),
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
        ],
    )


def learning_rate_schedule(args, steps_per_epoch):
    """Return the learning rate: a number, or a function of the step for a warm-up or --schedule cosine.

    The cosine is that of "SGDR", https://arxiv.org/abs/1608.03983, without restarts.
    """
    peak = args.learning_rate
    warmup_steps = args.warmup_epochs * steps_per_epoch
    first = peak / (warmup_steps + 1)
    if args.schedule == "cosine":
        decay_steps = max(1, args.epochs * steps_per_epoch - warmup_steps)
        return schedules.CosineDecay(first, decay_steps, warmup_target=peak, warmup_steps=warmup_steps)
    if warmup_steps:
        return schedules.PolynomialDecay(first, warmup_steps, end_learning_rate=peak)  # a linear warm-up
    return peak


def callbacks(args):
    """Return your own Keras callbacks, such as keras.callbacks.EarlyStopping.

    Checkpoints contain the state of EarlyStopping, ReduceLROnPlateau, CSVLogger and TensorBoard, and that of
    callbacks with the methods `state_dict()`, which returns plain values, and `load_state_dict(state)`.
    """
    return []


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train(args, run, state):
    """Train from the newest checkpoint to --epochs, with a checkpoint after each epoch."""
    initial_epoch = run.restore(state)  # the number of finished epochs, 0 without a checkpoint
    training = engine.TrainingBatches(run, augment)
    validation = engine.ValidationBatches(run)
    if run.progress.step:  # Keras' fit cannot start inside an epoch
        initial_epoch = state.finish_epoch(training, validation)
    state.model.fit(
        training,
        validation_data=validation,
        initial_epoch=initial_epoch,
        epochs=args.epochs,
        callbacks=state.callbacks,  # also save checkpoint-{epoch}.keras and log the metrics
        verbose=0,
    )


# ------------------------------------------------------------------------------------------------------------
# The training state: everything that a checkpoint contains. Data and learning rates follow from (seed, epoch,
# step).
# ------------------------------------------------------------------------------------------------------------


class TrainingState(engine.State):
    """Everything that training changes."""

    def __init__(self, args, run, data):
        super().__init__(args, run, data)
        with self.scope():
            self.model = build_model(args, data)
            compile_model(args, self.model, self.steps_per_epoch)
        self.callbacks = engine.Callbacks(callbacks(args), self)
        self.prepare()

    def state_dict(self):
        """Return the content of a checkpoint."""
        return {
            "model": self.model.variables,  # also the random numbers of dropout
            "optimizer": self.model.optimizer.variables,
            "learning_rate": self.learning_rate,  # before callbacks such as ReduceLROnPlateau change it
            "metrics": self.metrics,  # of the running epoch
            "callbacks": self.callbacks.states,
            "best_weights": self.callbacks.best_weights,  # of EarlyStopping(restore_best_weights=True)
        }

    def load_state_dict(self, checkpoint):
        """Load the content of a checkpoint."""
        self.assign(self.model.variables, checkpoint["model"])
        self.load_optimizer(checkpoint["optimizer"], checkpoint["learning_rate"])
        self.metrics = checkpoint["metrics"]
        self.callbacks.states = checkpoint["callbacks"]
        self.callbacks.best_weights = checkpoint["best_weights"]


def export_model(run, state):
    """Write `1/`, a SavedModel for TensorFlow Serving."""
    with run.export() as folder:
        state.export(folder / "1")


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------


def main(args):
    """Train and write the model and its metrics."""
    with Run(args, engine) as run:
        data = run.load_data(load_data(args))
        state = TrainingState(args, run, data)
        train(args, run, state)
        export_model(run, state)


if __name__ == "__main__":
    execute(main, args)
