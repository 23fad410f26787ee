"""Train an image classifier with MXNet, save a checkpoint after every epoch, and go on from the newest one.

Train:      python mxnet/train.py
Resume:     python mxnet/train.py                  (the same command: the newest checkpoint is found)
SageMaker:  MXNet(entry_point="train.py", source_dir="mxnet", checkpoint_s3_uri="s3://...", ...)

Reads class folders of images or arrays (--train, --validation); writes checkpoints (--checkpoint-path), the trained
model (--model-dir) and its metrics (--output-data-dir). `--help` lists all flags.
"""

import json
import os
from contextlib import nullcontext

import numpy as np

from common import checkpoints, cluster, errors, files, flags, images, interruption, report, saving, script, steps
from common.progress import Progress, mean_metrics

CHECKPOINT = "checkpoint-{}.params"  # the number of finished epochs; inside an epoch also that of its finished steps
SEED_STEPS = 16  # steps from one seeding to the next: on a CPU it takes a millisecond, as long as a small step


def parse_args(argv=None):
    """Return the flags of this script."""
    return flags.image_flags("mxnet").parse_args(argv)


if __name__ == "__main__":
    interruption.install()
    args = parse_args()  # before the slow imports: --help and a misspelt flag answer at once

with errors.framework("MXNet", "It exists for Linux on x86-64 and Python up to 3.12: pip install mxnet==1.9.1"):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads give their core to others, but not at once
    np.bool = bool  # MXNet uses this name, which NumPy dropped in 1.24
    import mxnet as mx
    from mxnet import autograd, gluon
    from mxnet.contrib import amp
    from mxnet.gluon import nn

    import parameter_servers


def choose_device(args):
    """Return the contexts to compute on; they change the speed, never which data or how many epochs."""
    gpus = [] if args.device == "cpu" else [mx.gpu(i) for i in range(mx.context.num_gpus())][: args.num_gpus]
    errors.check_device(args, "MXNet", gpus)
    report.log_device(args, f"{len(gpus)} GPU" if gpus else "cpu")
    os.environ.setdefault("MXNET_ENFORCE_DETERMINISM", str(int(args.deterministic)))  # concerns GPUs
    if args.precision != "fp32":
        amp.init({"bf16": "bfloat16", "fp16": "float16"}[args.precision])
    parameter_servers.start()
    return gpus or [mx.cpu()]


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
        raise errors.unfit_images(args, data, str(error).splitlines()[-1]) from error
    return model


class Normalize(gluon.HybridBlock):
    """Raw pixels to zero mean and unit variance; part of the model, so that it is served as it was trained."""

    def __init__(self, data, num_channels=None):
        super().__init__()
        for name, values in zip(("mean", "deviation"), data.channel_statistics()):
            init = mx.init.Constant(np.resize(values, (1, num_channels or len(values), 1, 1)))  # repeats grey
            # Not get_constant(), which writes a memory address into the exported model.
            setattr(self, name, self.params.get(name, shape=init.value.shape, init=init, grad_req="null"))

    def hybrid_forward(self, F, pixels, mean, deviation):
        return F.broadcast_div(F.broadcast_sub(F.cast(pixels, "float32"), mean), deviation)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state, but for what follows from (seed, epoch, step) anyway.
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args, data, model, optimizer, progress):
    """Copy the training state and write it in the background, unless its file is there; return the file's name."""
    path = args.checkpoint_path / checkpoints.name_of(CHECKPOINT, progress)
    described = progress.describe()  # by all workers
    if saving.is_wanted(path):
        run = checkpoints.describe_run(args, data.describe_job(args, optimizer.optimizer), mx)
        scaler = vars(optimizer._amp_loss_scaler) if args.precision == "fp16" else {}
        checkpoint = {"scaler": scaler, "progress": described, **run}
        arrays, best = copy_state(model, optimizer), progress.best_epoch()
        # Not MXNet's own format, which does not notice a full disk, nor save_states(): loading a pickle executes code.
        checkpoints.write(args, CHECKPOINT, path, best, lambda file: files.write_arrays(file, arrays, checkpoint))
    return path.name


def copy_state(model, optimizer):
    """Return the weights and the optimizer's state as numpy arrays by name, in memory used again for the next save."""
    mx.nd.waitall()  # with static memory the statistics of batch normalisation would be those of an earlier step
    weights = gluon.Parameter._reduce if len(optimizer._contexts) > 1 else gluon.Parameter.data
    state = {f"model/{name}": weights(parameter) for name, parameter in model.collect_params().items()}
    states = optimizer._updaters[0].states
    state.update({f"optimizer/{i}": array for i, array in states.items() if array is not None})
    for name, array in state.items():
        if name not in saving.memory:
            saving.memory[name] = np.empty(array.shape, array.dtype)
        array.copyto(mx.nd.from_numpy(saving.memory[name]))
    mx.nd.waitall()
    return {name: saving.memory[name] for name in state}


def load_checkpoint(args, data, model, optimizer):
    """Restore the newest checkpoint and return its Progress: that of a fresh start where there is none."""
    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read_checkpoint)
    if found is None:
        return Progress()
    path, (arrays, checkpoint) = found
    run = checkpoints.describe_run(args, data.describe_job(args, optimizer.optimizer), mx)
    checkpoints.check_same_job(args, path, checkpoint, run)
    progress = Progress.restore(checkpoint["progress"])
    replay_draws(args, data, model, optimizer._contexts, progress)
    load_model(path, arrays, model)
    for updater, device in zip(optimizer._updaters, optimizer._contexts):
        for name in [name for name in arrays if name.startswith("optimizer/")]:
            index, state = int(name.split("/")[1]), mx.nd.array(arrays[name], device, arrays[name].dtype)
            updater.states[index], updater.states_synced[index] = state, True
    if args.precision == "fp16" and checkpoint["scaler"]:
        vars(optimizer._amp_loss_scaler).update(checkpoint["scaler"])
    return progress


def replay_draws(args, data, model, devices, progress):
    """Draw again what dropout has drawn since the last seeding: MXNet's random state can neither be read nor saved."""
    sizes = steps.batch_sizes(len(data.train_labels), args.batch_size)
    last_seeding = progress.step // SEED_STEPS * SEED_STEPS
    mx.random.seed(steps.step_seed(args.seed, progress.epoch * len(sizes) + last_seeding))
    for size in sizes[last_seeding : progress.step]:
        with autograd.record():
            forward(model, devices, np.zeros((size, *data.image_shape), data.train_images.dtype), np.zeros(size))
    mx.nd.waitall()


def read_checkpoint(file):
    """Return what `save_checkpoint` has written: the arrays, and the dictionary; nothing in the file is executed."""
    return files.read_arrays(file)


def load_model(path, arrays, model):
    """Put the weights of the checkpoint at `path` into the model."""
    with checkpoints.restoring(path):
        for name, parameter in model.collect_params().items():
            parameter.set_data(mx.nd.array(arrays[f"model/{name}"], dtype=parameter.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, data, model, devices):
    """Train up to `--epochs` in total and return the Progress; a signal ends it after a step, with a checkpoint."""
    settings = {"learning_rate": args.learning_rate, "momentum": args.momentum, "wd": args.weight_decay}
    optimizer = gluon.Trainer(model.collect_params(), "sgd", settings, update_on_kvstore=False)
    if args.precision == "fp16":
        amp.init_trainer(optimizer)
    parameter_servers.broadcast(model.collect_params())  # nobody begins with weights of his own
    progress = load_checkpoint(args, data, model, optimizer)
    report.log_start(progress, args.epochs)
    interruption.defer()
    try:
        while progress.epoch < args.epochs:
            metrics = train_epoch(args, data, model, devices, optimizer, progress)
            progress.finish_epoch(metrics, evaluate(args, data, model, devices))
            save_checkpoint(args, data, model, optimizer, progress)
    except interruption.Interrupted as interrupted:
        interrupted.saved = save_checkpoint(args, data, model, optimizer, progress)
        raise
    return progress


def train_epoch(args, data, model, devices, optimizer, progress):
    """Train the rest of the epoch that `progress` is in; return the metrics of the whole epoch."""
    steps_per_epoch = steps.steps_per_epoch(len(data.train_labels), args.batch_size)
    batches = steps.training_batches(data.train_images, data.train_labels, args, progress.epoch + 1, progress.step)
    progress.loss_sum = mx.np.array([progress.loss_sum])
    progress.start_clock()
    for pixels, labels, batch_size in report.progress_bar(args, progress, steps_per_epoch, batches):
        interruption.check()
        step = progress.epoch * steps_per_epoch + progress.step
        if progress.step % SEED_STEPS == 0:
            mx.random.seed(steps.step_seed(args.seed, step))
        optimizer.set_learning_rate(steps.learning_rate(args, step, args.epochs * steps_per_epoch))
        with autograd.record():
            losses, loss_sum, hits = forward(model, devices, pixels, labels)
            with amp.scale_loss(losses, optimizer) if args.precision == "fp16" else nullcontext(losses) as scaled:
                autograd.backward(scaled)
        optimizer.allreduce_grads()  # over the devices of this worker; then over all workers
        parameter_servers.add_up([weights.list_grad() for weights in optimizer._params if weights.grad_req != "null"])
        optimizer.update(batch_size)
        progress.loss_sum.wait_to_read()  # MXNet computes in the background: let it lag by one step, not by an epoch
        progress.count_step(batch_size, loss_sum, hits)
        if progress.step < steps_per_epoch and progress.save_is_due(args, progress.step):
            save_checkpoint(args, data, model, optimizer, progress)
    return progress.training_metrics()


def evaluate(args, data, model, devices):
    """Return loss and accuracy over all validation samples, each counted once."""
    mx.nd.waitall()  # as for a checkpoint
    parameter_servers.broadcast(model.collect_params(".*running"))  # batch normalisation's statistics: the leader's
    loss_sum = correct = 0
    for pixels, labels in steps.validation_batches(data.validation_images, data.validation_labels, args):
        interruption.check()
        _, loss, hits = forward(model, devices, pixels, labels)
        loss_sum, correct = loss_sum + loss, correct + hits
    return mean_metrics(loss_sum, correct, len(data.validation_labels))


def forward(model, devices, pixels, labels):
    """Return the losses on each device, their sum, and the number of correct predictions."""
    devices = devices[: len(labels)]  # a small batch does not reach all of them
    arrays = [mx.nd.array(pixels.transpose(0, 3, 1, 2), dtype=pixels.dtype), mx.nd.array(labels)]
    pixels, labels = (gluon.utils.split_and_load(array, devices, even_split=False) for array in arrays)
    logits = [model(part).astype("float32") for part in pixels]
    losses = [gluon.loss.SoftmaxCrossEntropyLoss()(part, wanted) for part, wanted in zip(logits, labels)]
    with autograd.pause():  # what follows has no part in the gradients
        hits = [part.argmax(axis=1) == wanted for part, wanted in zip(logits, labels)]
        sums = [sum(part.sum().as_in_context(mx.cpu()) for part in parts) for parts in (losses, hits)]
    return (losses, *(array.as_np_ndarray() for array in sums))  # the kind that float() takes


def export_model(args, data, model, progress):
    """Write `model-symbol.json`, `model-0000.params` and `model-shapes.json`, for SageMaker's MXNet container."""
    if args.keep_best:
        path, found = checkpoints.read_best_checkpoint(args, CHECKPOINT, progress.best_epoch(), read_checkpoint)
        load_model(path, found[0], model)
    shape = (1, data.image_shape[2], *data.image_shape[:2])
    model(mx.nd.zeros(shape, ctx=model.collect_params().list_ctx()[0]))  # traces the network
    try:
        with files.atomic_export(args.model_dir) as folder:
            model.export(str(folder / "model"), epoch=0)
            mx.nd.load(str(folder / "model-0000.params"))  # MXNet does not notice when the last bytes find no room
            (folder / "model-shapes.json").write_text(json.dumps([{"name": "data", "shape": shape}]))
    except mx.base.MXNetError as error:
        raise errors.UserError(f"cannot write --model-dir {args.model_dir}: {str(error).splitlines()[-1]}") from error
    report.log(f"Model: {args.model_dir / 'model-symbol.json'} and model-0000.params")


def main(args):
    """Train and write the model and its metrics."""
    cluster.join(args)
    files.prepare_folders(args)
    checkpoints.prepare_folder(args.checkpoint_path, CHECKPOINT)
    mx.random.seed(args.seed)
    devices = choose_device(args)
    data = load_data(args)
    cluster.check_same(data.describe_content())
    model = build_model(args, data)
    model.collect_params().reset_ctx(devices)
    static = len(devices) == 1  # with several, batch normalisation would validate with stale statistics
    model.hybridize(static_alloc=static, static_shape=static)
    progress = train(args, data, model, devices)
    saving.wait()
    if cluster.leads():
        export_model(args, data, model, progress)
        report.write_results(args, progress, class_names=data.class_names)


if __name__ == "__main__":
    script.run(main, args)
