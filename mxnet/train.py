"""Train an image classifier with MXNet; run the same command again to resume.

Train:      python mxnet/train.py
Resume:     python mxnet/train.py                  (the newest checkpoint is found and continued)
SageMaker:  MXNet(entry_point="train.py", source_dir="mxnet", checkpoint_s3_uri="s3://...", ...)

Writes below --output: a checkpoint after every epoch, the trained model, and its metrics. `--help` lists all
flags.
"""

import math

from common import flags
from common.images import load_images, random_crop_and_flip
from common.run import Run, execute, start


def parse_args(argv=None):
    """Return the flags of this script. Add your own to the parser."""
    parser = flags.image_flags("mxnet")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = start(parse_args)  # before the slow imports: --help and a misspelt flag answer at once

import engine
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn
from records import RecordFile

# ------------------------------------------------------------------------------------------------------------
# Make it yours: replace the bodies of these functions. Nothing below this section knows what is trained.
# ------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return the training and the validation data set, such as two Gluon Datasets of (image, label).

    A float NDArray of three dimensions is an image (channels, height, width), as ToTensor makes it; other
    images are (height, width, channels). Images of uint8 are normalized with the mean and
    the standard deviation of the training images; other samples reach the network unchanged. Random numbers
    of NumPy, `random` and the framework are seeded for each batch: interruptions do not change them.
    """
    return load_images(args, RecordFile)


def augment(images, labels, rng):
    """Return a training batch with random changes; called with --augment.

    Take random numbers from `rng` only. Images are arrays (n, height, width, channels), labels are (n, ...).
    Only the images change here: if your labels are masks or boxes, change them alike.
    """
    return random_crop_and_flip(images, rng), labels


def build_model(args, data):
    """Return the network: images (n, channels, height, width) in, one logit per class (n, classes) out."""
    if args.model != "cnn":
        return engine.zoo_model(args.model, data)
    layers = []
    for filters in (32, 64, 128):
        layers.append(nn.Conv2D(filters, 3, padding=1, use_bias=False))
        layers.append(nn.BatchNorm())
        layers.append(nn.Activation("relu"))
        layers.append(nn.MaxPool2D(2))
    layers.append(nn.GlobalAvgPool2D())
    layers.append(nn.Flatten())
    layers.append(nn.Dropout(0.25))
    layers.append(nn.Dense(data.num_classes))
    model = nn.HybridSequential()
    model.add(*layers)
    # Uniform within 1 / sqrt(fan_in), as in PyTorch. The network learns faster than with Xavier's rule.
    model.initialize(init.Xavier("uniform", "in", magnitude=1))
    return model


def build_optimizer(args, model):
    """Return the optimizer. Parameters keep their own factors of the learning rate (`lr_mult`)."""
    settings = {"learning_rate": args.learning_rate, "wd": args.weight_decay}
    if args.optimizer == "adamw":
        return gluon.Trainer(model.collect_params(), "adamw", settings)
    settings["momentum"] = 0.9
    return gluon.Trainer(model.collect_params(), "sgd", settings)


def learning_rate_factor(args, step, steps_per_epoch):
    """Return the factor of all learning rates in a step, counted from 0 over all epochs.

    The cosine is that of "SGDR", https://arxiv.org/abs/1608.03983, without restarts.
    """
    warmup_steps = args.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if args.schedule == "constant":
        return 1.0
    total_steps = args.epochs * steps_per_epoch
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


def compute_loss(outputs, labels, weights):
    """Return the loss to minimize, summed over the samples, so that the parts of a split batch add up to it.

    The weights (n,) are ones, unless the data set returns a weight for each sample. Losses with more
    dimensions, such as (n, height, width), must be averaged to (n,) first. The log shows compute_metrics.
    """
    losses = -outputs.log_softmax().pick(labels)
    return (losses * weights).sum()


def compute_metrics(outputs, labels, weights):
    """Return each metric as a pair of sums over the samples, (numerator, denominator).

    The log shows their ratio over an epoch; of vectors, such as an entry per class, the mean of the ratios.
    """
    losses = -outputs.log_softmax().pick(labels)
    is_correct = outputs.argmax(1) == labels
    count = weights.sum()
    return {"loss": ((losses * weights).sum(), count), "accuracy": ((is_correct * weights).sum(), count)}


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train_step(args, state, batch):
    """Update the weights with one batch; return its metrics as sums."""
    factor = learning_rate_factor(args, batch.step, batch.steps_per_epoch)
    state.optimizer.set_learning_rate(state.initial_learning_rate * factor)
    losses = []
    metrics = []
    for images, labels, weights in state.load_batch(batch):  # a part of the batch for each device
        with autograd.record():
            outputs = state.network(images)
            loss = compute_loss(outputs, labels, weights)
        losses.append(loss)
        metrics.append(compute_metrics(outputs, labels, weights))
    autograd.backward(losses, state.loss_scales)
    state.optimizer.step(batch.samples_per_worker)  # gradients are averaged over workers
    return state.add_up(metrics)


def evaluate(run, state):
    """Compute the metrics of all validation samples."""
    state.eval()
    for batch in run.validation_batches():
        metrics = []
        for images, labels, weights in state.load_batch(batch):
            outputs = state.predict(images)
            metrics.append(compute_metrics(outputs, labels, weights))
        run.finish_step(state.add_up(metrics))


def train(args, run, state):
    """Train from the newest checkpoint to --epochs, with a checkpoint after each epoch."""
    initial_epoch = run.restore(state)  # the number of finished epochs, 0 without a checkpoint
    for epoch in range(initial_epoch, args.epochs):
        state.train()
        for batch in run.training_batches(epoch, augment):
            metrics = train_step(args, state, batch)
            run.finish_step(metrics)  # saves a checkpoint if one is due, and ends the training after a signal
        evaluate(run, state)
        is_over = run.finish_epoch()  # saves checkpoint-{epoch}.params and logs the metrics
        if is_over:  # --patience
            break


# ------------------------------------------------------------------------------------------------------------
# The training state: everything that a checkpoint contains. Random numbers and learning rates follow from
# (seed, epoch, step).
# ------------------------------------------------------------------------------------------------------------


class TrainingState(engine.State):
    """Everything that training changes."""

    def __init__(self, args, run, data):
        super().__init__(args, run, data)
        self.model = self.place(build_model(args, data))
        self.optimizer = build_optimizer(args, self.model)
        self.prepare()

    def state_dict(self):
        """Return the content of a checkpoint."""
        return {
            "model": {name: parameter.list_data()[0] for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer_state,
            "scaler": self.scaler,
        }

    def load_state_dict(self, checkpoint):
        """Load the content of a checkpoint."""
        for name, parameter in self.parameters.items():
            value = checkpoint["model"][name]
            parameter.set_data(nd.array(value, dtype=value.dtype))  # oneDNN cannot take a NumPy array here
        self.load_optimizer(checkpoint["optimizer"])
        self.scaler.update(checkpoint["scaler"])


def export_model(run, state):
    """Write `model-symbol.json` and `model-0000.params`, the network and the normalization of its images."""
    with run.export() as folder:
        state.export(folder)


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
