"""Train an image classifier with MXNet, save a checkpoint after every epoch, and go on from the newest one.

Train:      python mxnet/train.py
Resume:     python mxnet/train.py                  (the same command: the newest checkpoint is found)
SageMaker:  MXNet(entry_point="train.py", source_dir="mxnet", checkpoint_s3_uri="s3://...", ...)

Reads class folders of images or arrays (--train, --validation); writes checkpoints (--checkpoint-path), the trained
model (--model-dir) and its metrics (--output-data-dir). `--help` lists all flags.
"""

import errno
import json
import os
import time

import numpy as np

from common import checkpoints, errors, files, flags, images, report, steps

CHECKPOINT = "checkpoint-{}.params"  # the number of finished epochs


def parse_args(argv=None):
    """Return the flags of this script."""
    return flags.image_flags("mxnet").parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the slow imports: --help and a misspelt flag answer at once

with errors.framework("MXNet", "It exists for Linux on x86-64 and Python up to 3.12: pip install mxnet==1.9.1"):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave the cores to the others
    np.bool = bool  # MXNet uses this name, which NumPy dropped in 1.24
    import mxnet as mx
    from mxnet import autograd, gluon
    from mxnet.contrib import amp
    from mxnet.gluon import nn


def choose_device(args):
    """Return the contexts to compute on; they change the speed, never which data or how many epochs."""
    num_gpus = mx.context.num_gpus() if args.num_gpus is None else min(args.num_gpus, mx.context.num_gpus())
    if args.device == "cuda" and not num_gpus:
        raise errors.UserError("--device cuda: MXNet finds no GPU here; use --device auto or cpu")
    if args.device == "cpu":
        num_gpus = 0
    if args.precision == "fp16" and not num_gpus:
        raise errors.UserError("--precision fp16: MXNet has it on GPUs only; use --precision bf16 or fp32")
    devices = [mx.gpu(index) for index in range(num_gpus)] or [mx.cpu()]
    report.log(f"Device: {f'{num_gpus} GPU' if num_gpus else 'cpu'} ({args.precision})")
    if args.precision != "fp32":
        amp.init({"bf16": "bfloat16", "fp16": "float16"}[args.precision])
    return devices


# ---------------------------------------------------------------------------------------------------------------------
# Data and model: replace the bodies of these two functions with your own. Nothing else knows what is trained.
# ---------------------------------------------------------------------------------------------------------------------


def load_data(args):
    """Return an `images.Dataset`: uint8 or float32 images (n, height, width, channels) and int64 labels (n,)."""
    return images.load_images(args)


def build_model(args, data):
    """Return the network: raw pixels (n, channels, height, width) in, one logit per class (n, classes) out."""
    height, width, channels = data.image_shape
    num_classes = len(data.class_names)
    model = nn.HybridSequential(prefix="model_")
    with model.name_scope():
        if args.model == "cnn":
            model.add(Normalize(data))
            for filters in (32, 64, 128):
                model.add(nn.Conv2D(filters, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
                model.add(nn.MaxPool2D(2))
            model.add(nn.GlobalAvgPool2D(), nn.Flatten(), nn.Dropout(0.25), nn.Dense(num_classes))
        else:
            try:
                network = gluon.model_zoo.vision.get_model(args.model, classes=num_classes)
            except ValueError as error:  # its message is the only list of the names
                errors.check_choice("--model", args.model, ["cnn", *str(error).split("\n\t")[1:]])
                raise
            model.add(Normalize(data, num_channels=3), network)
    model.initialize(mx.init.Xavier())
    try:
        model(mx.nd.zeros((1, channels, height, width))).wait_to_read()  # also finds the shapes of the weights
    except (mx.base.MXNetError, ValueError) as error:
        raise errors.UserError(
            f"--model {args.model} cannot take images of {height}x{width}x{channels} ({str(error).splitlines()[-1]}): "
            "pass --image-size, such as 224"
        ) from error
    return model


class Normalize(gluon.HybridBlock):
    """Raw pixels to zero mean and unit variance; part of the model, so that it is served as it was trained."""

    def __init__(self, data, num_channels=None):
        super().__init__()
        mean, deviation = data.channel_statistics()
        # The zoo's networks want three channels: grey is repeated.
        self.repeats = num_channels // len(mean) if num_channels else 1
        self.mean = self.params.get_constant("mean", mean.reshape(1, -1, 1, 1))
        self.deviation = self.params.get_constant("deviation", deviation.reshape(1, -1, 1, 1))

    def hybrid_forward(self, F, pixels, mean, deviation):
        outputs = F.broadcast_div(F.broadcast_sub(F.cast(pixels, "float32"), mean), deviation)
        return F.tile(outputs, (1, self.repeats, 1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state. Order of samples, augmentation, dropout and learning rate are
# functions of (seed, epoch, step) and need no place in it.
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args, data, model, optimizer, history):
    """Write the training state after the last epoch of `history`."""
    epoch = history[-1]["epoch"]
    checkpoint = {
        "scaler": vars(optimizer._amp_loss_scaler) if args.precision == "fp16" else {},
        "epoch": epoch,
        "history": history,
        "job": data.describe_job(args),
        "flags": {flag: str(value) for flag, value in vars(args).items()},
    }
    mx.nd.waitall()  # with static memory the statistics of batch normalisation would be those of an earlier step
    arrays = {f"model/{name}": parameter._reduce() for name, parameter in model.collect_params().items()}
    # Not the optimizer's own save_states(): that is a pickle, and loading a pickle can execute anything.
    states = optimizer._updaters[0].states
    arrays.update({f"optimizer/{index}": state for index, state in states.items() if state is not None})
    arrays["checkpoint.json"] = mx.nd.array(np.frombuffer(json.dumps(checkpoint).encode(), np.uint8), dtype=np.uint8)
    with files.atomic_write(args.checkpoint_path / CHECKPOINT.format(epoch)) as file:
        try:
            mx.nd.save(file.name, arrays)
            mx.nd.load(file.name)  # MXNet does not notice when the last bytes find no room
        except mx.base.MXNetError as error:
            raise OSError(errno.EIO, "MXNet could not write all of it") from error
    checkpoints.remove_old_checkpoints(args.checkpoint_path, CHECKPOINT, epoch, args.keep_checkpoints)


def load_checkpoint(args, data, model, optimizer):
    """Restore the newest checkpoint; return the number of finished epochs and their history: 0 and [] without one."""

    def read(path):
        arrays = mx.nd.load(str(path))
        return arrays, json.loads(arrays.pop("checkpoint.json").asnumpy().tobytes())

    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read)
    if found is None:
        return 0, []
    epoch, path, (arrays, checkpoint) = found
    checkpoints.check_same_job(args, path, checkpoint, data.describe_job(args))
    with checkpoints.restoring(path):
        for name, parameter in model.collect_params().items():
            parameter.set_data(arrays[f"model/{name}"])
    optimizer._init_kvstore()
    for updater, device in zip(optimizer._updaters, optimizer._contexts):
        for name, state in arrays.items():
            if name.startswith("optimizer/"):
                index = int(name.split("/")[1])
                updater.states[index], updater.states_synced[index] = state.as_in_context(device), True
    if args.precision == "fp16" and checkpoint["scaler"]:
        vars(optimizer._amp_loss_scaler).update(checkpoint["scaler"])
    report.log(f"Resuming training from {path.name}")
    return epoch, checkpoint["history"]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, data, model, devices):
    """Train up to `--epochs` in total; return the number of epochs finished before, and the history of all."""
    settings = {"learning_rate": args.learning_rate, "momentum": args.momentum, "wd": args.weight_decay}
    optimizer = gluon.Trainer(model.collect_params(), "sgd", settings, update_on_kvstore=False)
    if args.precision == "fp16":
        amp.init_trainer(optimizer)
    initial_epoch, history = load_checkpoint(args, data, model, optimizer)
    report.log_start(initial_epoch, args.epochs)
    num_samples = len(data.train_labels)
    steps_per_epoch = steps.steps_per_epoch(num_samples, args.batch_size)

    for epoch in range(initial_epoch + 1, args.epochs + 1):
        started = time.perf_counter()
        loss_sum, correct = mx.nd.zeros(1), mx.nd.zeros(1)
        batches = steps.training_batches(data.train_images, data.train_labels, args, epoch)
        bar = report.progress_bar(epoch, steps_per_epoch, batches)
        for step, (pixels, labels) in enumerate(bar, start=(epoch - 1) * steps_per_epoch):
            mx.random.seed(steps.step_seed(args.seed, step))
            optimizer.set_learning_rate(steps.learning_rate(args, step, args.epochs * steps_per_epoch))
            with autograd.record():
                losses, hits = forward(model, devices, pixels, labels)
                if args.precision == "fp16":
                    with amp.scale_loss(losses, optimizer) as scaled:
                        autograd.backward(scaled)
                else:
                    autograd.backward(losses)
            optimizer.step(len(labels))
            loss_sum.wait_to_read()  # MXNet computes in the background: let it lag by one step, not by an epoch
            loss_sum, correct = loss_sum + total(losses), correct + total(hits)
        metrics = {"loss": loss_sum.asscalar() / num_samples, "accuracy": correct.asscalar() / num_samples}
        seconds = time.perf_counter() - started
        history.append(report.log_epoch(epoch, metrics, evaluate(args, data, model, devices), seconds, num_samples))
        save_checkpoint(args, data, model, optimizer, history)
    return initial_epoch, history


def evaluate(args, data, model, devices):
    """Return loss and accuracy over all validation samples, each counted once."""
    loss_sum = correct = 0
    for pixels, labels in steps.validation_batches(data.validation_images, data.validation_labels, args):
        losses, hits = forward(model, devices, pixels, labels)
        loss_sum, correct = loss_sum + total(losses).asscalar(), correct + total(hits).asscalar()
    num_samples = len(data.validation_labels)
    return {"loss": loss_sum / num_samples, "accuracy": correct / num_samples}


def forward(model, devices, pixels, labels):
    """Return, for each device, the losses of its samples and which of them are predicted correctly."""
    devices = devices[: len(labels)]  # a small batch does not reach all of them
    pixels = mx.nd.array(pixels.transpose(0, 3, 1, 2), dtype=pixels.dtype)
    pixels = gluon.utils.split_and_load(pixels, devices, even_split=False)
    labels = gluon.utils.split_and_load(mx.nd.array(labels), devices, even_split=False)
    logits = [model(part).astype("float32") for part in pixels]
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    losses = [cross_entropy(part, wanted) for part, wanted in zip(logits, labels)]
    return losses, [part.argmax(axis=1) == wanted for part, wanted in zip(logits, labels)]


def total(parts):
    """Return the sum over the arrays of all devices."""
    return sum(part.sum().as_in_context(mx.cpu()) for part in parts)


def export_model(args, data, model):
    """Write `model-symbol.json`, `model-0000.params` and `model-shapes.json`, for SageMaker's MXNet container."""
    height, width, channels = data.image_shape
    model(mx.nd.zeros((1, channels, height, width), ctx=model.collect_params().list_ctx()[0]))  # traces the network
    shapes = [{"name": "data", "shape": [1, channels, height, width]}]
    try:
        with files.atomic_export(args.model_dir) as folder:
            model.export(str(folder / "model"), epoch=0)
            mx.nd.load(str(folder / "model-0000.params"))  # MXNet does not notice when the last bytes find no room
            (folder / "model-shapes.json").write_text(json.dumps(shapes))
    except mx.base.MXNetError as error:
        reason = str(error).splitlines()[-1]
        raise errors.UserError(f"cannot write the model to --model-dir {args.model_dir}: {reason}") from error
    report.log(f"Model: {args.model_dir / 'model-symbol.json'} and model-0000.params")


def main(args):
    """Train and write the model and its metrics."""
    files.prepare_folders(args)
    checkpoints.remove_leftovers(args.checkpoint_path, CHECKPOINT)
    mx.random.seed(args.seed)
    devices = choose_device(args)
    data = load_data(args)
    model = build_model(args, data)
    model.collect_params().reset_ctx(devices)
    static = len(devices) == 1  # with several, batch normalisation would validate with stale statistics
    model.hybridize(static_alloc=static, static_shape=static)
    initial_epoch, history = train(args, data, model, devices)
    export_model(args, data, model)
    report.write_results(args, history, initial_epoch, class_names=data.class_names)


if __name__ == "__main__":
    errors.run(main, args)
