"""The network of the earlier public samples, trained by our script and by a similar pipeline.

Two 5 x 5 convolutions of 6 and 16 channels, three dense layers of 120, 84 and 10, in batches of 128 of 32 x
32 x 3 images. Their pipeline: torchvision transforms of each image (crop, mirror, to tensor, normalise) in
two worker processes of a DataLoader. Ours: pytorch/train.py with another `build_model` and `--augment`.
Samples per second of the fastest epoch, without the first.
"""

import statistics
import time

import numpy as np

from benchmarks import harness

NUMBER, EPOCHS = 12_800, 3


def measure(repetitions):
    """Return the figure."""
    turns = harness.take_turns(
        repetitions,
        ours=lambda: harness.run_json("predecessor", "ours"),
        theirs=lambda: harness.run_json("predecessor", "theirs"),
    )
    raw = f"{statistics.median(turns['ours']):,.0f} and {statistics.median(turns['theirs']):,.0f} samples/s"
    return [
        harness.Figure(
            "our script / per-image transforms", harness.ratio(turns["ours"], turns["theirs"]), ">= 3", raw
        )
    ]


def network():
    """Return the layers after the normalisation."""
    from torch import nn

    convolutions = [
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


def ours():
    """Train with our script."""
    script = harness.import_script("pytorch")
    script.build_model = lambda args, data: network()
    flags = ["--train", harness.write_images("images", NUMBER * 10 // 9), "--batch-size", 128, "--augment"]
    args = script.parse_args([*map(str, flags), "--epochs", str(EPOCHS), "--log-steps", "0"])
    script.main(args)
    return max(harness.history(args, "samples_per_second")[1:])


def theirs():
    """Train with per-image transforms in two workers."""
    import torch
    from PIL import Image
    from torchvision import transforms

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (NUMBER, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, NUMBER).tolist()
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return NUMBER

        def __getitem__(self, index):
            return transform(Image.fromarray(pixels[index])), labels[index]

    loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, num_workers=2, persistent_workers=True)
    model = network()
    optimizer, loss_of = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), torch.nn.CrossEntropyLoss()
    rates = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        for batch, wanted in loader:
            optimizer.zero_grad()
            loss_of(model(batch), wanted).backward()
            optimizer.step()
        rates.append(NUMBER / (time.perf_counter() - began))
    return max(rates[1:])


if __name__ == "__main__":
    harness.print_json(ours=ours, theirs=theirs)
