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

import tensorflow as tf


def load_data(args):
    """Return a function that makes the training batches of an epoch, and the validation batches.

    Its random numbers depend only on --seed, the epoch, and the index of the image, so that a restarted run
    gets the same batches as an uninterrupted one.
    """
    train, validation = load_images(args, RecordFile)
    images, labels = map(tf.constant, train[:])

    def training_batches(epoch, first_step):
        seed = (args.seed, epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(len(labels)), seed)

        def load(index):
            image_seed = tf.random.experimental.stateless_fold_in(seed, index)
            return distort(images[index], image_seed), labels[index]

        dataset = tf.data.Dataset.from_tensor_slices(order)
        dataset = dataset.skip(first_step * args.batch_size)  # before `map`, so that it takes no time
        dataset = dataset.map(load, tf.data.AUTOTUNE)
        return dataset.batch(args.batch_size).prefetch(tf.data.AUTOTUNE)

    training_batches.classes = train.classes
    validation_batches = tf.data.Dataset.from_tensor_slices(validation[:]).batch(args.batch_size)
    return training_batches, validation_batches


def distort(image, seed):
    """Return an image with another contrast, shifted by up to an eighth of its size."""
    seeds = tf.random.experimental.stateless_split(seed, 2)
    height, width, _ = image.shape
    padded = tf.image.resize_with_crop_or_pad(image, height + height // 4, width + width // 4)
    shifted = tf.image.stateless_random_crop(padded, image.shape, seeds[0])
    return tf.image.stateless_random_contrast(shifted, 0.6, 1.0, seeds[1])


def augment(images, labels, rng):
    """Return a training batch with random changes; called with --augment, but not for a tf.data.Dataset."""
    return random_crop_and_flip(images, rng), labels


def build_model(args, data):
    """Return the network: images (n, height, width, channels) in, one logit per class (n, classes) out."""
    inputs = keras.Input(data.sample_shape, dtype=str(data.dtype))
    outputs = inputs
    if data.mean is not None:  # images of uint8
        outputs = layers.Normalization(mean=data.mean, variance=data.std**2, dtype="float32")(outputs)
    if args.model != "cnn":
        return keras.Model(inputs, engine.zoo_model(args.model, data, outputs))
    for filters in (32, 64, 128):
        outputs = layers.Conv2D(filters, 3, padding="same", use_bias=False)(outputs)
        outputs = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(outputs)
        outputs = layers.ReLU()(outputs)
        outputs = layers.MaxPooling2D(2)(outputs)
    outputs = layers.GlobalAveragePooling2D()(outputs)
    outputs = layers.Dropout(0.25)(outputs)
    outputs = layers.Dense(data.num_classes, dtype="float32")(outputs)
    return keras.Model(inputs, outputs)


class FocalLoss(keras.losses.Loss):
    """Cross-entropy with a lower weight for well-classified samples.

    It is the loss of "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002, for class
    indices and logits. (Keras has it for one-hot labels.)
    """

    def __init__(self, gamma=2.0, **options):
        super().__init__(**options)
        self.gamma = gamma

    def call(self, labels, logits):
        """Return the loss of each sample."""
        losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        probabilities = keras.ops.exp(-losses)  # of the correct classes
        return (1 - probabilities) ** self.gamma * losses


def compile_model(args, model, steps_per_epoch):
    """Set the optimizer, the loss and the metrics of the network.

    The log shows the metric named "loss" instead of the focal loss.
    """
    learning_rate = learning_rate_schedule(args, steps_per_epoch)
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=args.weight_decay),
        loss=FocalLoss(),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy("loss", from_logits=True),
            keras.metrics.SparseCategoricalAccuracy("accuracy"),
        ],
    )


def learning_rate_schedule(args, steps_per_epoch):
    """Return the learning rate: a number, or a function of the step for a warm-up or --schedule cosine.

    The callbacks below need a number. The cosine is that of "SGDR", https://arxiv.org/abs/1608.03983, without
    restarts.
    """
    peak = args.learning_rate
    warmup_steps = args.warmup_epochs * steps_per_epoch
    first = peak / (warmup_steps + 1)
    if args.schedule == "cosine":
        decay_steps = max(1, args.epochs * steps_per_epoch - warmup_steps)
        return schedules.CosineDecay(first, decay_steps, warmup_target=peak, warmup_steps=warmup_steps)
    if warmup_steps:
        return schedules.PolynomialDecay(first, warmup_steps, end_learning_rate=peak)  # a line that rises
    return peak


class Warmup(keras.callbacks.Callback):
    """Raise the learning rate from zero in the first steps of a training, and then leave it unchanged.

    A schedule cannot do this because ReduceLROnPlateau changes the learning rate later. Without the saved
    state, the warm-up would start again after each restart.
    """

    def __init__(self, peak, num_steps):
        super().__init__()
        self.peak = peak
        self.num_steps = num_steps
        self.step = 0

    def on_train_batch_begin(self, batch, logs=None):
        """Set the learning rate of the step."""
        if self.step < self.num_steps:
            self.step += 1
            self.model.optimizer.learning_rate = self.peak * self.step / self.num_steps

    def state_dict(self):
        """Return the state of this callback for a checkpoint, in plain values."""
        return {"step": self.step}

    def load_state_dict(self, state):
        """Restore the state from a checkpoint."""
        self.step = state["step"]


def callbacks(args):
    """Return the Keras callbacks. Checkpoints hold the state of all of them."""
    return [
        Warmup(args.learning_rate, num_steps=50),
        keras.callbacks.ReduceLROnPlateau(factor=0.3, patience=2),
        keras.callbacks.EarlyStopping(patience=5, restore_best_weights=True),
    ]


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
