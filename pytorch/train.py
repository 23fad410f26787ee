"""Train an image classifier with PyTorch; run the same command again to resume.

Train:      python pytorch/train.py
Resume:     python pytorch/train.py                (the newest checkpoint is found and continued)
Two GPUs:   torchrun --standalone --nproc-per-node 2 pytorch/train.py
SageMaker:  PyTorch(entry_point="train.py", source_dir="pytorch", checkpoint_s3_uri="s3://...", ...)

Writes below --output: a checkpoint after every epoch, the trained model, and its metrics. `--help` lists all
flags.
"""

import math

from common import flags
from common.images import load_images, random_crop_and_flip
from common.run import Run, execute, start


def parse_args(argv=None):
    """Return the flags of this script. Add your own to the parser."""
    parser = flags.image_flags("pytorch")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = start(parse_args)  # before the slow imports: --help and a misspelt flag answer at once

import engine
import torch
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------------------
# Make it yours: replace the bodies of these functions. Nothing below this section knows what is trained.
# ------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return the training and the validation data set, such as two torch Datasets of (image, label).

    A tensor of three dimensions is an image (channels, height, width), as in torchvision; a NumPy array or
    PIL image is (height, width, channels). Images of uint8 are normalized with the mean and
    the standard deviation of the training images; other samples reach the network unchanged. Random numbers
    of NumPy, `random` and the framework are seeded for each sample: interruptions do not change them.
    """
    return load_images(args)


def augment(images, labels, rng):
    """Return a training batch with random changes; called with --augment.

    Take random numbers from `rng` only. Images are arrays (n, height, width, channels), labels are (n, ...).
    Only the images change here: if your labels are masks or boxes, change them alike.
    """
    return random_crop_and_flip(images, rng), labels


def build_model(args, data):
    """Return the network: images (n, channels, height, width) in, one logit per class (n, classes) out.

    Its random numbers and those of the loss must be torch's: they are seeded for each step.
    """
    if args.model != "cnn":
        return engine.zoo_model(args.model, data)
    inputs = data.sample_shape[2]
    layers = []
    for filters in (32, 64, 128):
        layers.append(nn.Conv2d(inputs, filters, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(filters))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2))
        inputs = filters
    layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Flatten())
    layers.append(nn.Dropout(0.25))
    layers.append(nn.Linear(inputs, data.num_classes))
    return nn.Sequential(*layers)


def build_optimizer(args, model):
    """Return the optimizer. Parameter groups keep their own learning rates.

    To clip gradients, call torch.nn.utils.clip_grad_norm_ in a hook: see Optimizer.register_step_pre_hook.
    After a restart the settings come from here, and the state and what training changes from the checkpoint.
    """
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=0.9, weight_decay=args.weight_decay
    )


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
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return (losses * weights).sum()


def compute_metrics(outputs, labels, weights):
    """Return each metric as a pair of sums over the samples, (numerator, denominator).

    The log shows their ratio over an epoch; of vectors, such as an entry per class, the mean of the ratios.
    """
    losses = F.cross_entropy(outputs, labels, reduction="none")
    is_correct = outputs.argmax(1) == labels
    count = weights.sum()
    return {"loss": ((losses * weights).sum(), count), "accuracy": ((is_correct * weights).sum(), count)}


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def train_step(args, state, batch):
    """Update the weights with one batch; return its metrics as sums."""
    images, labels, weights = state.load_batch(batch)
    factor = learning_rate_factor(args, batch.step, batch.steps_per_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    state.optimizer.zero_grad()
    outputs = state.network(images)
    # The sum becomes a mean over the batch: gradients are averaged over the workers.
    loss = compute_loss(outputs, labels, weights) / batch.samples_per_worker
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return compute_metrics(outputs.detach(), labels, weights)


@torch.no_grad()
def evaluate(run, state):
    """Compute the metrics of all validation samples."""
    state.eval()
    for batch in run.validation_batches():
        images, labels, weights = state.load_batch(batch)
        outputs = state.predict(images)
        run.finish_step(compute_metrics(outputs, labels, weights))


def train(args, run, state):
    """Train from the newest checkpoint to --epochs, with a checkpoint after each epoch."""
    initial_epoch = run.restore(state)  # the number of finished epochs, 0 without a checkpoint
    for epoch in range(initial_epoch, args.epochs):
        state.train()
        for batch in run.training_batches(epoch, augment):
            metrics = train_step(args, state, batch)
            run.finish_step(metrics)  # saves a checkpoint if one is due, and ends the training after a signal
        evaluate(run, state)
        is_over = run.finish_epoch()  # saves checkpoint-{epoch}.pt and logs the metrics
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
        """Return the content of a checkpoint: tensors, numbers, text, lists and dictionaries."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, checkpoint):
        """Load the content of a checkpoint."""
        self.model.load_state_dict(checkpoint["model"])
        self.load_optimizer(checkpoint["optimizer"])
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])


def export_model(run, state):
    """Write `model.pth`, the state_dict of the network."""
    with run.export() as folder:
        state.model.to(memory_format=torch.contiguous_format)  # the layout that other tools expect
        torch.save(state.model.state_dict(), folder / "model.pth")


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
