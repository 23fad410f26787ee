"""Device, precision, several GPUs and hosts, and checkpoint files for `train.py`. No need to edit this file.

`common/run.py` calls the functions; the training state in `train.py` inherits from `State`.
"""

import contextlib
import copy
import os
import signal
import socket
import warnings

import numpy as np

from common import atomic_io, batches, errors, model_folder, preemption, self_check
from common.errors import UserError
from common.report import log, log_weights

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads spin briefly before they sleep
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it cuBLAS may change bits from run to run

with errors.importing(
    "PyTorch and torchvision",
    "Activate their environment (source .venv/bin/activate), or install them: pip install torch torchvision",
):
    import torch
    import torchvision
    from torch import distributed, nn
    from torch.utils._pytree import tree_leaves, tree_map
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as TorchDataset

CHECKPOINT = "checkpoint-{}.pt"
FIRST_NUMBER = 1  # in the name of the checkpoint after the first epoch
FRAMEWORK = "torch"
VERSION = str(torch.__version__)
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)  # beside tensors, in a checkpoint


def start(args, workers):
    """Return the torch.device to compute on, after connecting the workers.

    The device changes only the speed, not the data or the number of epochs.
    """
    available = torch.cuda.is_available() and args.num_gpus != 0
    if args.device == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no GPU; use --device auto or cpu")
    local_rank = errors.read_count(
        "LOCAL_RANK", 0
    )  # set by torchrun: the number of this process on this host
    device = torch.device(f"cuda:{local_rank}" if available and args.device != "cpu" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # torch.cuda.manual_seed seeds this device
        torch.set_float32_matmul_precision("high")  # TF32 for products; convolutions use it anyway
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a slow debugging aid
    torch.manual_seed(args.seed)
    shards = workers.describe_shards(args.batch_size, "samples of a batch")
    log(f"Device: {device} ({args.precision}){shards}")
    if workers.size > 1:
        _connect(device, workers)
    return device


def _connect(device, workers):
    """Start PyTorch's process group, which sums gradients: NCCL between GPUs, otherwise Gloo."""
    workers.check_same({"device": device.type})
    interface = os.environ.get("SM_NETWORK_INTERFACE_NAME")
    if workers.address.startswith("127."):
        interface = socket.if_indextoname(1)  # loopback
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    store = None
    if workers.is_main_process:
        # Without a listener the store would listen at all addresses.
        listener = socket.create_server((workers.address, 0))
        port = listener.getsockname()[1]
        store = distributed.TCPStore(
            workers.address, port, is_master=True, master_listen_fd=listener.detach()
        )
    port = workers.all_gather(store and store.port)[0]
    if store is None:
        store = distributed.TCPStore(workers.main_address, port)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=workers.rank, world_size=workers.size)


class State:
    """The training state shared by all models: device, precision, workers, and moving data.

    A subclass sets `model` and `optimizer` and then calls `prepare`.

    Attributes:
        network: the model to train with; it may be compiled, or average gradients over workers.
        predict: the model to evaluate with.
        job: what identifies the job, besides the flags and the data.
        model_facts: what `model.json` says about the model, besides the data.
        scaler: the loss scaler of `--precision fp16`; otherwise it does nothing.
    """

    def __init__(self, args, run, data):
        self.args = args
        self.data = data
        self.device = run.device
        self.workers = run.workers
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self._statistics = channel_statistics(data, self.device)

    def place(self, model):
        """Return the model on the device, after one trial with a sample of zeros.

        Raises UserError if the model cannot take samples of this shape.
        """
        dtype = torch.float32 if self._statistics else torch.from_numpy(np.zeros(1, self.data.dtype)).dtype
        sample = torch.zeros(1, *self._shape(), dtype=dtype)
        try:
            with torch.no_grad():
                outputs = model.eval()(sample)
        except (RuntimeError, AssertionError, ValueError) as error:
            size = "x".join(map(str, self.data.sample_shape))
            raise UserError(
                f"--model {self.args.model} cannot take images of {size} ({error}): "
                "pass --image-size, such as 224"
            ) from error
        if batches.batch_sizes(len(self.data.train), self.args.batch_size)[-1] < 2 * self.workers.size:
            self._check_one_sample(model, sample)
        self._check_loss(outputs)
        array = outputs.float().numpy() if isinstance(outputs, torch.Tensor) else None
        self.model_facts = {"outputs": model_folder.describe_outputs(array, self.data.classes)}
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # the layout of the images
        return model.to(self.device)

    def _check_loss(self, outputs):
        """Log a warning if compute_loss returns the mean over the samples instead of the sum."""
        compute_loss = type(self).state_dict.__globals__.get("compute_loss")
        labels = torch.from_numpy(np.zeros((1, *self.data.label_shape), self.data.label_dtype))
        losses = []
        with contextlib.suppress(Exception):  # a loss that needs other labels: the first step will check it
            for count in (1, 2):
                copies = tree_map(lambda tensor: torch.cat([tensor] * count), outputs)  # noqa: B023
                losses.append(compute_loss(copies, torch.cat([labels] * count), torch.ones(count)))
        losses = [loss for loss in losses if isinstance(loss, torch.Tensor)]
        for loss in losses:
            if loss.numel() > 1:
                shape = tuple(loss.shape)
                raise UserError(
                    f"compute_loss returns a tensor of shape {shape}: return the sum over the samples"
                )
        if len(losses) == 2:
            self_check.check_loss(losses[0].item(), losses[1].item())

    def _check_one_sample(self, model, sample):
        """Raise UserError if the model cannot learn from a batch of one sample."""
        try:
            with torch.no_grad():
                copy.deepcopy(model).train()(sample)
        except ValueError as error:
            raise UserError(
                f"--batch-size {self.args.batch_size} makes batches of one sample per worker, from "
                f"which this model cannot learn ({error}): raise it"
            ) from error

    def prepare(self):
        """Set `network`, `predict` and `job`, and remember the learning rate of each parameter group."""
        structure = model_folder.describe_structure(_describe_layers(self.model, self.optimizer))
        self.job = {"optimizer": type(self.optimizer).__name__, model_folder.STRUCTURE: structure}
        for group in self.optimizer.param_groups:
            group["initial"] = {name: value for name, value in group.items() if name != "params"}
            group["initial_lr"] = group["lr"]
        self.predict = self.model
        if self.args.precision != "fp32":
            dtype = torch.float16 if self.args.precision == "fp16" else torch.bfloat16
            self.predict = MixedPrecision(self.model, self.device.type, dtype)
        self.network = self.predict
        if self.workers.size > 1:
            self.network = self._average_gradients(self.network)
        if self.args.compile:
            # One kernel per batch size. A dynamic kernel depends on the size that came first, and so would
            # the bits.
            self.network = torch.compile(self.network, dynamic=False)

    def attributes(self):
        """Return the attributes of the optimizer and of the layers, by the name of the owner."""
        owners = {"an attribute of the optimizer": vars(self.optimizer)}
        for name, module in self.model.named_modules():
            unsaved = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            owners[f"an attribute of the layer {name or type(module).__name__}"] = {**vars(module), **unsaved}
        return owners

    def _average_gradients(self, model):
        warnings.filterwarnings(
            "ignore", message="Grad strides do not match"
        )  # costs nothing with a small network
        network = nn.parallel.DistributedDataParallel(model.eval())
        # The first step sets the order in which gradients are summed, and so their rounding: it must not
        # depend on the batch with which a run starts.
        outputs = network(torch.zeros(1, *self._shape(), device=self.device))
        sum(output.sum() for output in tree_leaves(outputs)).backward()
        return network

    def _shape(self):
        """Return the shape of a sample as the network gets it: channels first for an image."""
        shape = self.data.sample_shape
        if len(shape) == 3:
            return shape[2], shape[0], shape[1]
        return shape

    def train(self):
        """Switch to training, for dropout and batch normalization."""
        self.model.train()

    def eval(self):
        """Switch to evaluation; the batch-normalization statistics are those of the main process."""
        self.model.eval()
        if self.workers.size > 1:
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)

    def load_batch(self, batch):
        """Return images (n, channels, height, width), labels and weights on the device; seed the step.

        Images of uint8 become float32 of zero mean and unit variance per channel; other samples stay as they
        are.
        """
        arrays = (batch.images, batch.labels, batch.weights)
        images, labels, weights = map(torch.as_tensor, arrays)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(batch.seed)
            # From pinned memory the copy does not wait for the GPU, nor the GPU for the next one.
            pinned = [tensor.pin_memory() for tensor in (images, labels, weights)]
            images, labels, weights = [tensor.to(self.device, non_blocking=True) for tensor in pinned]
        else:
            # Not torch.manual_seed(), which takes up to half a millisecond: it seeds all kinds of devices.
            torch.default_generator.manual_seed(batch.seed)
        if images.ndim == 4:
            images = images.permute(0, 3, 1, 2)
        if images.dtype == torch.uint8 and self._statistics:
            images = normalize(images.float(), *self._statistics, eps=0)
        return images, labels, weights

    def has_finite_weights(self, content):
        """Return whether the weights in the copied content of a checkpoint are finite."""
        saved = content.get("model", {})
        trained = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        weights = [saved[name] for name in trained if name in saved]
        # A sum takes a tenth of the time. If it is not finite, finite weights may have overflowed.
        return all(bool(each.sum().isfinite() or each.isfinite().all()) for each in weights)

    def load_optimizer(self, saved):
        """Load an optimizer's state.

        The settings of its parameter groups are those of this run, except those that training changes, such
        as a step count of the optimizer, or a momentum set by a scheduler.
        """
        settings = self.optimizer.state_dict()["param_groups"]
        saved_settings = saved["param_groups"]
        groups = [len(group["params"]) for group in settings]
        if groups != [len(group["params"]) for group in saved_settings]:
            raise ValueError("the parameter groups of build_optimizer differ from those of the checkpoint")
        for number, (now, then) in enumerate(zip(settings, saved_settings)):
            for name, value in then.items():
                was = tuple(value) if isinstance(now.get(name), tuple) else value
                if name not in now or value != then["initial"].get(name, value):
                    now[name] = was
                elif now[name] != was and name not in ("params", "lr", "initial"):
                    log(f"Changed in parameter group {number}: {name} was {was} and is now {now[name]}")
            now["lr"] = then["lr"]  # which the next step sets
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})

    def load_weights(self, path):
        """Load the tensors of a .pth or .safetensors file that fit the model, and log the others."""
        weights = _read_weights(path)
        own = self.model.state_dict()
        fitting = {
            name: tensor
            for name, tensor in weights.items()
            if name in own and own[name].shape == tensor.shape
        }
        if not fitting:
            raise UserError(
                f"--weights {path}: no layer fits the model, whose layers are {', '.join(list(own)[:4])}, ..."
            )
        self.model.load_state_dict(fitting, strict=False)
        log_weights(path, len(fitting), set(own) - set(fitting), set(weights) - set(fitting))


# (images - mean) / deviation per channel in one kernel, for training and prediction: a function of images
# (n, channels, height, width) of float32 and of the result of `channel_statistics`; with eps=0.
normalize = nn.functional.batch_norm


def channel_statistics(data, device):
    """Return mean and variance of the channels as tensors; None for samples that are not normalized."""
    if data.mean is None:
        return None
    statistics = data.mean, data.std.astype(np.float64) ** 2
    return [torch.tensor(values, dtype=torch.float32, device=device) for values in statistics]


def _read_weights(path):
    """Return the tensors by name of a .pth or .safetensors file; nothing in the file is executed."""
    if not path.exists():
        raise UserError(f"--weights {path} does not exist: expected a .pth or .safetensors file")
    if path.is_dir():  # a SageMaker channel
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.pth"), *path.glob("*.pt")])
        if len(files) != 1:
            raise UserError(
                f"--weights {path} contains {len(files)} .pth or .safetensors files: expected one"
            )
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            with errors.importing("safetensors", "Install it with: pip install safetensors"):
                from safetensors.torch import load_file
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors for a damaged file
        raise UserError(f"--weights {path} cannot be read: {errors.first_line(error)}") from error
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):  # a checkpoint of this script
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in weights.values()
    ):
        raise UserError(f"--weights {path} is not a state_dict: expected tensors by name")
    return weights


def _describe_layers(model, optimizer):
    """Return lines that describe the layers, and the parameters in the order of the optimizer."""
    lines = [f"{name}: {type(layer).__name__}({layer.extra_repr()})" for name, layer in model.named_modules()]
    names = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        lines.append(f"{name}: {list(parameter.shape)}")
    for group in optimizer.param_groups:
        lines.append(", ".join(names.get(parameter, "?") for parameter in group["params"]))
    return lines


class MixedPrecision(nn.Module):
    """Computes a model in lower precision; its outputs are float32 again."""

    def __init__(self, model, device_type, dtype):
        super().__init__()
        self.model = model
        self.device_type = device_type
        self.dtype = dtype

    def forward(self, *inputs):
        with torch.autocast(self.device_type, self.dtype):
            outputs = self.model(*inputs)
        return tree_map(to_float32, outputs)


def to_float32(value):
    """Return a tensor of lower precision as float32, anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return value


def zoo_model(name, data):
    """Return an untrained network of torchvision's model zoo; grey images are repeated for three channels.

    Raises UserError for an unknown name; the message suggests the nearest ones.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    errors.check_choice("--model", name, ["cnn", *names])
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=data.num_classes, **options)
    if data.sample_shape[-1] == 1:
        network.register_forward_pre_hook(_repeat_grey)
    return network


def _repeat_grey(module, inputs):
    return (inputs[0].expand(-1, 3, -1, -1),)


# Reading data -----------------------------------------------------------------------------------------------


def seed_sample(seed):
    """Seed the random numbers that a data set draws, such as those of torchvision's transforms."""
    torch.default_generator.manual_seed(seed)


def to_array(sample):
    """Return a sample as a NumPy array. A tensor of three dimensions is an image with the channels first."""
    if isinstance(sample, torch.Tensor) and sample.ndim == 3:
        sample = sample.permute(1, 2, 0)
    return np.asarray(sample)


def to_device(value):
    """Return a number as it is and a list as a tensor on the device."""
    if not isinstance(value, list):
        return value
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return torch.tensor(value, device=device)


class _Steps(TorchDataset):
    """The batches of an epoch as the items of a torch Dataset."""

    def __init__(self, loader):
        self.loader = loader

    def __getitem__(self, step):
        return self.loader(step)


def load_with_processes(loader, steps, num_processes):
    """Return an iterator over `loader(step)` for each step in order, prepared ahead by processes."""
    data_loader = DataLoader(
        _Steps(loader),
        batch_size=None,
        sampler=steps,
        num_workers=num_processes,
        collate_fn=_as_tensors,
        worker_init_fn=_start_loader,
        generator=torch.Generator(),  # otherwise it would draw from the global one
        multiprocessing_context="fork",  # the loader contains modules, which cannot be pickled
    )
    return iter(data_loader)


def _as_tensors(batch):
    tensors = [torch.as_tensor(array) for array in batch[:3]]  # in shared memory
    return type(batch)(*tensors, *batch[3:])


def _start_loader(number):
    torch.set_num_threads(1)
    preemption.take_over(signal.SIG_IGN)  # the training needs the batch for its last step


# Checkpoints ------------------------------------------------------------------------------------------------


def copy_to_host(state, memory, name=()):
    """Return `state` with copies of its tensors in `memory`, which is reused by the next save.

    Raises UserError for a type that torch.load refuses.
    """
    if isinstance(state, dict):
        return {key: copy_to_host(value, memory, (*name, key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copy_to_host(value, memory, (*name, index)) for index, value in enumerate(state)]
    if isinstance(state, torch.Tensor):
        if name not in memory:
            memory[name] = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return memory[name].copy_(state)
    if isinstance(state, np.generic):
        return state.item()
    if state is None or isinstance(state, PLAIN):
        return state
    raise UserError(
        f"state_dict() returns a {type(state).__name__} as {'/'.join(map(str, name))}: expected tensors, "
        "numbers, text, lists and dictionaries, because reading a checkpoint must not execute code"
    )


write_checkpoint = torch.save  # a function of (content, file)


def read_checkpoint(file):
    """Return what `write_checkpoint` has written; nothing in the file is executed."""
    atomic_io.check_zip(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("progress"), dict):
        raise ValueError("it is not a checkpoint of this script")
    return content


def describe_machine(args):
    """Return the facts that change the bits of the result, but not its quality."""
    return {"CPU threads": torch.get_num_threads(), FRAMEWORK: VERSION}
