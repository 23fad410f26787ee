"""Baselines for `gpu.py`: a minimal training loop, a bare copy of a training state, and plain XGBoost.

Each function runs in its own process, uses no code of the training scripts, and returns plain numbers.
"""

import os
import statistics
import time

from benchmarks import harness


def train(network, size, batch_size, precision, steps, epochs, device, kind):
    """Return the samples per second of the loop with one batch on the GPU, and with batches from memory."""
    import torch
    from torch import nn

    size, batch_size, steps, epochs = map(int, (size, batch_size, steps, epochs))
    torch.backends.cudnn.benchmark = kind != "untuned"
    torch.set_float32_matmul_precision("high")
    model = build_model(network).to(device, memory_format=torch.channels_last)
    forward = torch.compile(model, dynamic=False) if kind == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    images = torch.randint(256, (4 * batch_size, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(10, (len(images),))
    on_card = images[:batch_size].to(device), labels[:batch_size].to(device)

    def from_memory():
        chosen = torch.randint(len(images), (batch_size,))
        batch = images[chosen], labels[chosen]
        if device == "cpu":
            return batch
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]

    def step(pixels, labels):
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            logits = forward(pixels.permute(0, 3, 1, 2))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    def samples_per_second(next_batch):
        rates = []
        for _ in range(epochs):
            began = time.perf_counter()
            for _ in range(steps):
                loss = step(*next_batch())
            loss.item()  # waits for the GPU
            rates.append(steps * batch_size / (time.perf_counter() - began))
        return statistics.median(rates[1:])

    return {"card": samples_per_second(lambda: on_card), "memory": samples_per_second(from_memory)}


def build_model(network):
    """Return the network of `pytorch/train.py` for ten classes, including normalization."""
    from torch import nn

    class Normalize(nn.Module):
        def forward(self, pixels):
            return (pixels.float() - 127.5) / 73.6

    if network != "cnn":
        import torchvision

        return nn.Sequential(Normalize(), torchvision.models.get_model(network, num_classes=10))
    layers = [Normalize()]
    for inputs, filters in ((3, 32), (32, 64), (64, 128)):
        layers.append(nn.Conv2d(inputs, filters, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(filters))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, 10))


def copy(num_bytes, device, folder):
    """Return the seconds to copy from the GPU to pinned memory, and to write the copy to a file."""
    import torch

    source = torch.ones(int(num_bytes) // 4, device=device)
    target = torch.empty_like(source, device="cpu", pin_memory=device != "cpu")
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    path = os.path.join(folder, "bare.pt")
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save({"state": target}, file)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - began
    os.unlink(path)
    return {"copy": statistics.median(seconds[1:]), "write": written}


def xgboost(train, validation, rounds, device):
    """Return the rounds per second of `xgb.train` with the same tables, parameters and evaluation."""
    import numpy as np
    import xgboost as xgb
    from pyarrow import parquet

    def read(folder):
        columns = parquet.read_table(f"{folder}/table.parquet").columns
        return np.column_stack([column.to_numpy() for column in columns])

    class Clock(xgb.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            times.append(time.perf_counter())

    times = []
    tables = [read(train), read(validation)]
    matrix = xgb.QuantileDMatrix(tables[0][:, 1:], tables[0][:, 0])
    held_out = xgb.QuantileDMatrix(tables[1][:, 1:], tables[1][:, 0], ref=matrix)
    params = {"objective": "binary:logistic", "eval_metric": ["logloss", "error"], "device": device}
    evals = [(matrix, "train"), (held_out, "validation")]
    xgb.train(params, matrix, int(rounds), evals=evals, verbose_eval=False, callbacks=[Clock()])
    return (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    harness.print_json(train=train, copy=copy, xgboost=xgboost)
