"""Train an image classifier with PyTorch, save a checkpoint after every epoch, and go on from the newest one.

Train:      python pytorch/train.py
Resume:     python pytorch/train.py                (the same command: the newest checkpoint is found)
Two GPUs:   torchrun --standalone --nproc-per-node 2 pytorch/train.py
SageMaker:  PyTorch(entry_point="train.py", source_dir="pytorch", checkpoint_s3_uri="s3://...", ...)

Reads class folders of images or arrays (--train, --validation); writes checkpoints (--checkpoint-path), the trained
model (--model-dir) and its metrics (--output-data-dir). `--help` lists all flags.
"""

import os
import warnings

from common import checkpoints, cluster, errors, files, flags, images, interruption, report, saving, script, steps
from common.progress import Progress, mean_metrics

CHECKPOINT = "checkpoint-{}.pt"  # the number of finished epochs; inside an epoch also that of its finished steps


def parse_args(argv=None):
    """Return the flags of this script."""
    return flags.image_flags("pytorch").parse_args(argv)


if __name__ == "__main__":
    interruption.install()
    args = parse_args()  # before the slow imports: --help and a misspelt flag answer at once

with errors.framework("PyTorch and torchvision", "Install them with: pip install torch torchvision"):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads give their core to others, but not at once
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has the same bits in each run only with it
    import torch
    import torchvision
    from torch import distributed, nn


def choose_device(args):
    """Return where to compute; it changes the speed, never which data or how many epochs."""
    available = torch.cuda.is_available() and args.num_gpus != 0
    errors.check_device(args, "PyTorch", available)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's number of this process on this host
    device = torch.device(f"cuda:{local_rank}" if available and args.device != "cpu" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # also the one whose random numbers are seeded
        torch.set_float32_matmul_precision("high")  # TF32 where there is a choice; convolutions have it anyway
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in debugging that costs time
    report.log_device(args, device)
    if cluster.size > 1:
        connect_workers(device)
    return device


def connect_workers(device):
    """Start PyTorch's own engine, which sums gradients: NCCL between GPUs, else Gloo."""
    cluster.check_same({"device": device.type})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if os.environ.get("SM_NETWORK_INTERFACE_NAME"):
            os.environ.setdefault(name, os.environ["SM_NETWORK_INTERFACE_NAME"])
    store = distributed.TCPStore(cluster.address, 0, is_master=True) if cluster.leads() else None
    port = cluster.gather(store and store.port)[0]
    store = store or distributed.TCPStore(cluster.leader_address, port)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=cluster.rank, world_size=cluster.size)


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
    if args.model == "cnn":
        layers = [Normalize(data)]
        for inputs, filters in ((channels, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, num_classes)]
        model = nn.Sequential(*layers)
    else:
        names = torchvision.models.list_models(module=torchvision.models)
        errors.check_choice("--model", args.model, ["cnn", *names])
        options = {"aux_logits": False} if args.model in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(args.model, weights=None, num_classes=num_classes, **options)
        model = nn.Sequential(Normalize(data, num_channels=3), network)
    try:
        model.eval()(torch.zeros(1, channels, height, width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise errors.unfit_images(args, data, error) from error
    return model


class Normalize(nn.Module):
    """Raw pixels to zero mean and unit variance; part of the model, so that it is served as it was trained."""

    def __init__(self, data, num_channels=None):
        super().__init__()
        mean, deviation = data.channel_statistics()
        self.num_channels = num_channels or len(mean)  # the zoo's networks want three: grey is repeated
        self.register_buffer("mean", torch.from_numpy(mean).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.from_numpy(deviation).view(1, -1, 1, 1))

    def forward(self, pixels):
        return ((pixels.float() - self.mean) / self.deviation).expand(-1, self.num_channels, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one file holds the whole training state, but for what follows from (seed, epoch, step) anyway.
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args, data, model, optimizer, scaler, progress):
    """Copy the training state and write it in the background, unless its file is there; return the file's name."""
    path = args.checkpoint_path / checkpoints.name_of(CHECKPOINT, progress)
    described = progress.describe()  # by all workers
    if saving.is_wanted(path):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        checkpoint = {**copy_to_cpu(state), "progress": described, **describe_run(args, data, optimizer)}
        best = progress.best_epoch()
        checkpoints.write(args, CHECKPOINT, path, best, lambda file: torch.save(checkpoint, file))
    return path.name


def copy_to_cpu(state, name=()):
    """Return `state` with copies of its tensors, in memory that is used again for the next save."""
    if isinstance(state, dict):
        return {key: copy_to_cpu(value, (*name, key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copy_to_cpu(value, (*name, index)) for index, value in enumerate(state)]
    if not isinstance(state, torch.Tensor):
        return state
    if name not in saving.memory:
        saving.memory[name] = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
    return saving.memory[name].copy_(state)


def describe_run(args, data, optimizer):
    """Return what the next run compares itself with."""
    return checkpoints.describe_run(args, data.describe_job(args, optimizer), torch, torch.get_num_threads())


def load_checkpoint(args, data, model, optimizer, scaler):
    """Restore the newest checkpoint and return its Progress: that of a fresh start where there is none."""
    found = checkpoints.read_newest_checkpoint(args.checkpoint_path, CHECKPOINT, read_checkpoint)
    if found is None:
        return Progress()
    path, checkpoint = found
    checkpoints.check_same_job(args, path, checkpoint, describe_run(args, data, optimizer))
    with checkpoints.restoring(path):
        model.load_state_dict(checkpoint["model"])
        settings = optimizer.state_dict()["param_groups"]  # from the flags of this run
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": settings})
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    return Progress.restore(checkpoint["progress"])


def read_checkpoint(file):
    """Return what `save_checkpoint` has written; nothing in the file is executed."""
    files.check_zip(file)
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "job" not in checkpoint:
        raise ValueError("it is not a checkpoint of this script")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args, data, model, device):
    """Train up to `--epochs` in total and return the Progress; a signal ends it after a step, with a checkpoint."""
    settings = {"momentum": args.momentum, "weight_decay": args.weight_decay}  # on GPUs it is a multi-tensor one anyway
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, **settings)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    network = distribute(data, model, device)
    # Code for each batch size of its own: else an earlier step decides which code, and so which bits, a batch gets.
    network = torch.compile(network, dynamic=False) if args.compile else network
    progress = load_checkpoint(args, data, model, optimizer, scaler)
    report.log_start(progress, args.epochs)
    interruption.defer()
    try:
        while progress.epoch < args.epochs:
            metrics = train_epoch(args, data, model, network, device, optimizer, scaler, progress)
            progress.finish_epoch(metrics, evaluate(args, data, model, device))
            save_checkpoint(args, data, model, optimizer, scaler, progress)
    except interruption.Interrupted as interrupted:
        interrupted.saved = save_checkpoint(args, data, model, optimizer, scaler, progress)
        raise
    return progress


def distribute(data, model, device):
    """Return the network to train with: the model itself, or around it what averages the gradients of all workers."""
    if cluster.size == 1:
        return model
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # costs nothing with so small a network
    network = nn.parallel.DistributedDataParallel(model.eval())
    # The first step decides on the order in which gradients are summed, which rounds: take it here, before any counts.
    height, width, channels = data.image_shape
    network(torch.zeros(1, channels, height, width, device=device)).sum().backward()
    return network


def train_epoch(args, data, model, network, device, optimizer, scaler, progress):
    """Train the rest of the epoch that `progress` is in; return the metrics of the whole epoch."""
    steps_per_epoch = steps.steps_per_epoch(len(data.train_labels), args.batch_size)
    batches = steps.training_batches(data.train_images, data.train_labels, args, progress.epoch + 1, progress.step)
    # Not torch.manual_seed(): it seeds all kinds of devices, for which it takes up to half a millisecond.
    seed = torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    model.train()
    progress.start_clock()
    for pixels, labels, batch_size in report.progress_bar(args, progress, steps_per_epoch, batches):
        interruption.check()
        step = progress.epoch * steps_per_epoch + progress.step
        seed(steps.step_seed(args.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = steps.learning_rate(args, step, args.epochs * steps_per_epoch)
        optimizer.zero_grad()
        loss, hits = forward(args, network, device, pixels, labels)
        scaler.scale(loss / batch_size * cluster.size).backward()  # the workers' gradients are averaged
        scaler.step(optimizer)
        scaler.update()
        progress.count_step(batch_size, loss.detach(), hits)
        if progress.step < steps_per_epoch and progress.save_is_due(args, progress.step):
            save_checkpoint(args, data, model, optimizer, scaler, progress)
    return progress.training_metrics()


def evaluate(args, data, model, device):
    """Return loss and accuracy over all validation samples, each counted once."""
    loss_sum = correct = 0
    model.eval()
    for buffer in model.buffers() if cluster.size > 1 else ():  # of batch normalisation the leader's statistics count
        distributed.broadcast(buffer, 0)
    with torch.no_grad():
        for pixels, labels in steps.validation_batches(data.validation_images, data.validation_labels, args):
            interruption.check()
            loss, hits = forward(args, model, device, pixels, labels)
            loss_sum, correct = loss_sum + loss, correct + hits
    return mean_metrics(loss_sum, correct, len(data.validation_labels))


def forward(args, model, device, pixels, labels):
    """Return the summed loss of a batch and its number of correct predictions, as tensors on the device."""
    pixels, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU, nor the GPU for the next one
        pixels, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (pixels, labels))
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=args.precision != "fp32"):
        logits = model(pixels)
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, (logits.argmax(1) == labels).sum()


def export_model(args, data, model, progress):
    """Write `model.pth`, the state_dict of the network, for SageMaker's PyTorch serving container."""
    if args.keep_best:
        path, checkpoint = checkpoints.read_best_checkpoint(args, CHECKPOINT, progress.best_epoch(), read_checkpoint)
        with checkpoints.restoring(path):
            model.load_state_dict(checkpoint["model"])
    with files.atomic_write(args.model_dir / "model.pth") as file:
        torch.save(model.state_dict(), file)
    report.log(f"Model: {args.model_dir / 'model.pth'}")


def main(args):
    """Train and write the model and its metrics."""
    cluster.join(args)
    files.prepare_folders(args)
    checkpoints.prepare_folder(args.checkpoint_path, CHECKPOINT)
    torch.manual_seed(args.seed)
    device = choose_device(args)
    data = load_data(args)
    cluster.check_same(data.describe_content())
    model = build_model(args, data).to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # as the pixels come; what tensor cores want
    progress = train(args, data, model, device)
    saving.wait()
    if cluster.leads():
        export_model(args, data, model, progress)
        report.write_results(args, progress, class_names=data.class_names)


if __name__ == "__main__":
    script.run(main, args)
