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

from torch.utils.data import Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

# The task without --train: count the holes of a digit. Only one digit in ten has two holes.
NUM_HOLES = {"0": 1, "4": 1, "6": 1, "8": 2, "9": 1}
MAX_GRADIENT_NORM = 1.0


class TransformedImages(Dataset):
    """Images with a torchvision transform, which may draw random numbers."""

    def __init__(self, images, transform):
        self.images = images
        self.transform = transform
        self.classes = images.classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


class Holes(TransformedImages):
    """Images of digits, labelled with their number of holes instead of the digit."""

    def __init__(self, images, transform):
        super().__init__(images, transform)
        self.digits = images.classes
        self.classes = ["no hole", "one hole", "two holes"]

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, NUM_HOLES.get(self.digits[label], 0)


def load_data(args):
    """Return the training and validation images; only the training images have random transforms."""
    train, validation = load_images(args)
    random_transforms = [
        v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1)),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
    ]
    to_image = [v2.ToPILImage(), v2.RGB()]
    to_tensor = [v2.PILToTensor()]  # uint8: the images are normalized later
    dataset = Holes if args.train is None else TransformedImages
    return (
        dataset(train, v2.Compose(to_image + random_transforms + to_tensor)),
        dataset(validation, v2.Compose(to_image + to_tensor)),
    )


def augment(images, labels, rng):
    """Return a training batch with random changes; called with --augment.

    Take random numbers from `rng` only. Images are arrays (n, height, width, channels), labels are (n, ...).
    """
    return random_crop_and_flip(images, rng), labels


def build_model(args, data):
    """Return a ResNet-18 with a new head. --weights then replaces the initial weights of the backbone."""
    model = resnet18(weights=None)
    # No layer of the weights file has the names of the new head ("fc.1"), even with the same classes.
    model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(model.fc.in_features, data.num_classes))
    return model


def build_optimizer(args, model):
    """Return AdamW with a tenth of --learning-rate for the backbone, and gradients clipped to a norm."""
    head = list(model.fc.parameters())
    backbone = [weight for name, weight in model.named_parameters() if not name.startswith("fc.")]
    groups = [
        {"params": backbone, "lr": args.learning_rate / 10},
        {"params": head, "lr": args.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)

    def clip_gradients(*_):
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


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
    """Return the loss to minimize, summed over the samples: cross-entropy with label smoothing."""
    losses = F.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.1)
    return (losses * weights).sum()


def compute_metrics(outputs, labels, weights):
    """Return loss and accuracy as pairs of sums, (numerator, denominator), and macro F1 as a pair of vectors.

    The log shows the mean of the ratios of a vector: here, F1 of each class is 2 TP / (2 TP + FP + FN).
    The loss has no label smoothing, so that it is comparable with other trainings.
    """
    losses = F.cross_entropy(outputs, labels, reduction="none")
    predicted = outputs.argmax(1)
    is_correct = predicted == labels
    count = weights.sum()
    num_classes = outputs.shape[1]
    num_predicted = torch.bincount(predicted, weights, num_classes)  # TP + FP of each class
    num_labelled = torch.bincount(labels, weights, num_classes)  # TP + FN
    num_correct = torch.bincount(labels, weights * is_correct, num_classes)  # TP
    return {
        "loss": ((losses * weights).sum(), count),
        "accuracy": ((is_correct * weights).sum(), count),
        "f1": (2 * num_correct, num_predicted + num_labelled),
    }


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
