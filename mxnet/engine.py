"""Device, precision, several GPUs and hosts, and checkpoint files for `train.py`. No need to edit this file.

`common/run.py` calls the functions; the training state in `train.py` inherits from `State`.
"""

import atexit
import contextlib
import io
import json
import operator
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np

from common import batches, errors, machine, model_folder, preemption, self_check
from common.datasets import ArrayDataset
from common.errors import UserError
from common.report import log, log_weights

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads spin briefly before they sleep
np.bool = bool  # MXNet uses this name, which NumPy 1.24 removed

_HINT = "It exists for Linux on x86-64 and Python up to 3.12: pip install mxnet==1.9.1"
with errors.importing("MXNet", _HINT):
    import mxnet as mx
    from mxnet import autograd, gluon
    from mxnet.base import MXNetError
    from mxnet.contrib import amp
    from mxnet.gluon import nn

CHECKPOINT = "checkpoint-{}.params"
FIRST_NUMBER = 1  # in the name of the checkpoint after the first epoch
FRAMEWORK = "mxnet"
VERSION = str(mx.__version__)
SEED_STEPS = 16  # steps from one seeding to the next: on a CPU it takes 1.5 ms, as long as a small step
SEED_ONCE_PER_BATCH = True  # also the random numbers of a data set, for that reason


def start(args, workers):
    """Return the list of contexts to compute on.

    The devices change only the speed, not the data or the number of epochs.
    """
    devices = _find_devices(args)
    device = str(devices[0].device_type)
    if args.device == "cuda" and device != "gpu":
        raise UserError("--device cuda: MXNet finds no GPU; use --device auto or cpu")
    if args.precision == "fp16" and device != "gpu":
        raise UserError("--precision fp16: MXNet has it on GPUs only; use --precision bf16 or fp32")
    os.environ.setdefault("MXNET_ENFORCE_DETERMINISM", str(int(args.deterministic)))  # affects GPUs only
    _set_precision(args, device)
    mx.random.seed(args.seed)
    shards = workers.describe_shards(args.batch_size, "samples of a batch")
    number = f"{len(devices)} " if len(devices) > 1 else ""
    log(f"Device: {number}{device} ({args.precision}){shards}")
    if workers.size > 1:
        workers.check_same({"device": device})
    return devices


def _find_devices(args):
    gpus = []
    if args.device != "cpu":
        gpus = [mx.gpu(number) for number in range(mx.context.num_gpus())][: args.num_gpus]
    if gpus:
        return gpus
    num_cpus = int(os.environ.get("MXNET_CPU_CONTEXTS", 1))  # tests use several
    return [mx.cpu(number) for number in range(num_cpus)]


def _set_precision(args, device):
    """Set the precision of the flags, which MXNet then uses in the whole process.

    Raises UserError if the process already has another one, or if the processor has no bf16.
    """
    before = getattr(amp, "precision_of_process", None)
    if before not in (None, args.precision):
        raise UserError(
            f"--precision {args.precision}: an earlier training of this process has set {before}, which "
            "MXNet cannot undo; start a new process"
        )
    if args.precision == "bf16" and device == "cpu" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        raise UserError(
            "--precision bf16: MXNet has it only on processors with AVX-512, and this one has none; "
            "use --precision fp32"
        )
    if args.precision != "fp32" and before is None:
        amp.init({"bf16": "bfloat16", "fp16": "float16"}[args.precision])
        amp.precision_of_process = args.precision


class State:
    """The training state shared by all models: device, precision, workers, and moving data.

    A subclass sets `model` and `optimizer` and then calls `prepare`.

    Attributes:
        network: the model to train with; its outputs are float32 in any precision.
        predict: the model to evaluate with.
        parameters: the weights and statistics of the model by the names that `save_parameters` gives them.
        initial_learning_rate: that of the optimizer before the first step.
        scaler: the loss scale of `--precision fp16` and when it changes next; otherwise empty.
        loss_scales: that loss scale on each device; None in another precision.
        optimizer_state: the optimizer's arrays by index of the weight, and its attributes, always up to date.
        job: what identifies the job, besides the flags and the data.
        model_facts: what `model.json` says about the model, besides the data.
    """

    def __init__(self, args, run, data):
        mx.name.NameManager().__enter__()  # give layers the same names in each training of a process
        self.args = args
        self.data = data
        self.devices = run.device
        self.workers = run.workers
        self.servers = ParameterServers(run.workers)
        self._is_training = False
        self._is_seeded = False
        self._in_flight = []
        self._normalize = None
        if data.mean is not None:
            self._normalize = Normalize(data.mean, data.std)
            self._normalize.initialize(ctx=self.devices)
            self._normalize.hybridize()
        is_float = np.dtype(data.dtype).kind == "f"
        self._sample_type = np.float32 if is_float else data.dtype
        self._is_own_data = not isinstance(data.train, ArrayDataset)
        if self._is_own_data:
            self._describe_own_data()

    def _describe_own_data(self):
        """Log how the user's own data set is treated differently."""
        if self.args.loaders:
            log(
                "Batches are loaded between the steps, without --loaders: the data set may draw some of "
                "MXNet's random numbers, which belong to the whole process"
            )
        sample = self.data.train[0][0]
        if isinstance(sample, mx.nd.NDArray) and _has_channels_first(sample):
            log(f"Samples of shape {sample.shape}: read as (channels, height, width), as ToTensor makes them")

    def place(self, model):
        """Return the model on the devices with all layers initialized, after one trial.

        Raises UserError if the model cannot take samples of this shape.
        """
        if not isinstance(model, gluon.HybridBlock):
            raise UserError(
                f"build_model returns a {type(model).__name__}: expected a HybridBlock, which can be exported"
            )
        for parameter in model.collect_params().values():
            is_deferred = bool(parameter._deferred_init)  # initialized with the first batch
            if parameter._data is None and not is_deferred:
                parameter.initialize(default_init=mx.init.Xavier())
        try:
            outputs = model(self._zeros(mx.cpu()))
            mx.nd.waitall()
        except (MXNetError, ValueError, AssertionError) as error:
            size = "x".join(map(str, self.data.sample_shape))
            raise UserError(
                f"--model {self.args.model} cannot take images of {size} "
                f"({errors.first_line(error)}): pass --image-size, such as 224"
            ) from error
        self._check_loss(outputs)
        array = outputs.astype("float32").asnumpy() if isinstance(outputs, mx.nd.NDArray) else None
        self.model_facts = {"outputs": model_folder.describe_outputs(array, self.data.classes)}
        model.collect_params().reset_ctx(self.devices)
        return model

    def _check_loss(self, outputs):
        """Log a warning if compute_loss returns the mean over the samples instead of the sum."""
        compute_loss = type(self).state_dict.__globals__.get("compute_loss")
        losses = []
        with contextlib.suppress(Exception):  # a loss that needs other labels: the first step will check it
            for count in (1, 2):
                labels = mx.nd.zeros((count, *self.data.label_shape))
                copies = mx.nd.concat(*[outputs] * count, dim=0)
                losses.append(compute_loss(copies, labels, mx.nd.ones(count)).asscalar())
            self_check.check_loss(*losses)

    def _zeros(self, device):
        """Return a batch of one sample of zeros as the network gets it: channels first for an image."""
        shape = self.data.sample_shape
        if len(shape) == 3:
            shape = shape[2], shape[0], shape[1]
        dtype = np.float32 if self._normalize else self._sample_type
        return mx.nd.zeros((1, *shape), device, dtype)

    def prepare(self):
        """Set the other attributes, and give all devices and workers the same weights."""
        sizes = batches.batch_sizes(len(self.data.train), self.args.batch_size)
        if sizes[-1] // self.workers.size < len(self.devices):
            raise UserError(
                f"--batch-size {self.args.batch_size} makes batches of {sizes[-1]} samples for "
                f"{self.workers.size} workers with {len(self.devices)} devices each: expected a sample for "
                "each device; raise it, or pass --num-gpus"
            )
        static = len(self.devices) == 1  # with several, evaluation would use stale batch-norm statistics
        self.model.hybridize(static_alloc=static, static_shape=static)
        self.network = self.model
        if self.args.precision != "fp32":
            self.network = lambda *inputs: _to_float32(self.model(*inputs))
        self.predict = self.network
        self.parameters = named_parameters(self.model)
        self._statistics = [each for each in self.parameters.values() if each.grad_req == "null"]
        self._prepare_trainer(self.optimizer)
        self._send_parameters(self.parameters.values())

    def _prepare_trainer(self, trainer):
        optimizer = trainer.optimizer
        if optimizer.lr_scheduler is not None:
            raise UserError("build_optimizer sets lr_scheduler: write it into learning_rate_factor instead")
        structure = model_folder.describe_structure(self._describe_layers(trainer))
        self.job = {"optimizer": type(optimizer).__name__, model_folder.STRUCTURE: structure}
        self.initial_learning_rate = trainer.learning_rate
        attributes = vars(optimizer)
        self.optimizer_state = {
            "arrays": trainer._updaters[0].states,
            "attributes": attributes,
            "numbers_before": {
                key: value for key, value in attributes.items() if type(value) in (int, float)
            },
        }
        if self.job["optimizer"] in ("LBSGD", "SGLD"):
            name = self.job["optimizer"]
            log(f"{name} has a state that is not saved: a resumed training is not bit-identical")
        # Only the devices of this process; gradients of the workers are added up below.
        trainer._kvstore_params = {"kvstore": "device", "update_on_kvstore": False}
        if self.workers.size > 1:
            trainer._scale /= self.workers.size  # gradients are averaged over workers
            self._add_up_devices = trainer._allreduce_grads
            trainer._allreduce_grads = self._add_up_gradients
        self.scaler = {}
        self.loss_scales = None
        if self.args.precision == "fp16":
            amp.init_trainer(trainer)
            self.scaler = vars(trainer._amp_loss_scaler)

    def _describe_layers(self, trainer):
        """Return lines that describe the layers, and the parameters in the order of the optimizer.

        The symbol of the network is not used: --precision bf16 adds layers to it.
        """
        lines = [repr(self.model)]
        lines += [f"{name}: {parameter.shape}" for name, parameter in self.parameters.items()]
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return lines + [names.get(id(parameter), "?") for parameter in trainer._params]

    def _add_up_gradients(self):
        """Replace the gradients by their sums over all devices and workers."""
        self._add_up_devices()
        trained = [each for each in self.optimizer._params if each.grad_req != "null"]
        self.servers.add_up([parameter.list_grad() for parameter in trained])

    def _send_parameters(self, parameters):
        """Set each parameter to its value on the first device of the main process."""
        if self.workers.size == 1 and len(self.devices) == 1:
            return
        for parameter in parameters:
            value = parameter.data(self.devices[0]).asnumpy()
            content = self.workers.broadcast(value.tobytes())
            received = np.frombuffer(content, value.dtype).reshape(value.shape)
            parameter.set_data(mx.nd.array(received, dtype=value.dtype))

    def train(self):
        """Switch to training: the random numbers depend on the step."""
        self._is_training = True
        self._is_seeded = False

    def eval(self):
        """Switch to evaluation; the batch-normalization statistics are those of the main process."""
        self._is_training = False
        mx.random.seed(self.args.seed)
        mx.nd.waitall()  # with static memory the statistics would be those of an earlier step
        self._send_parameters(self._statistics)

    def load_batch(self, batch):
        """Return (images, labels, weights) for each device; seed the random numbers.

        Images (n, channels, height, width) of uint8 become float32 of zero mean and unit variance per
        channel; other samples stay as they are. Labels and weights are float32, in which MXNet computes.
        """
        if self._is_training:
            # MXNet's random state can neither be read nor saved. The user's data set may have drawn from it.
            step = batch.step % batch.steps_per_epoch
            if self._is_own_data or step % SEED_STEPS == 0:
                mx.random.seed(batch.seed)
            elif not self._is_seeded:
                self._replay(batch.step // batch.steps_per_epoch, step)
            self._is_seeded = True
            if self.scaler:
                self._scale_loss()
        images = batch.images
        if images.ndim == 4:
            images = images.transpose(0, 3, 1, 2)
        devices = self.devices[: len(batch.labels)]  # a small batch does not need all of them
        columns = [[images], [batch.labels], [batch.weights]]
        if len(devices) > 1:
            columns = [np.array_split(column, len(devices)) for [column] in columns]
        parts = []
        for device, *arrays in zip(devices, *columns):
            part = []
            for array, dtype in zip(arrays, (self._sample_type, np.float32, np.float32)):
                copy = mx.nd.empty(array.shape, device, dtype)
                copy._sync_copyfrom(array)  # takes a third of the time of mx.nd.array()
                part.append(copy)
            if self._normalize:
                part[0] = self._normalize(part[0])
            parts.append(part)
        # MXNet computes in the background: let it lag by one step, not by an epoch.
        self._in_flight.append(parts[0][0])
        if len(self._in_flight) > 2:
            earlier = self._in_flight.pop(0)
            mx.base.check_call(mx.base._LIB.MXNDArrayWaitToWrite(earlier.handle))  # until it is unused
        return parts

    def _replay(self, epoch, step):
        """Repeat the random draws of the network since the last seeding, such as those of dropout."""
        statistics = [array for each in self._statistics for array in each.list_data()]
        saved = [array.copy() for array in statistics]
        mx.nd.waitall()
        loader = batches.BatchLoader(self.args, self.data.train, self.workers, None, epoch)
        self._is_training = False
        for earlier in range(step // SEED_STEPS * SEED_STEPS, step):
            batch = loader(earlier)
            if earlier % SEED_STEPS == 0:
                mx.random.seed(batch.seed)
            for images, _, _ in self.load_batch(batch):
                with autograd.record():
                    self.network(images)
        self._is_training = True
        mx.nd.waitall()
        for array, before in zip(statistics, saved):
            before.copyto(array)
        mx.nd.waitall()

    def _scale_loss(self):
        """Set the loss scale of the next step."""
        trainer = self.optimizer
        scale = trainer._amp_loss_scaler.loss_scale
        self.loss_scales = [mx.nd.full((1,), scale, device) for device in self.devices]
        trainer._scale = trainer._amp_original_scale / scale

    def add_up(self, metrics):
        """Return the metrics of a step added up over the devices: numbers, and float32 arrays on the CPU.

        Args:
            metrics: for each device pairs (numerator, denominator) by name.
        """
        totals = {}
        is_same = len(metrics) == len(self.devices) == 1
        for part in metrics:
            for name, pair in part.items():
                values = []
                for value in pair:
                    if isinstance(value, np.ndarray):
                        value = mx.nd.array(value)
                        is_same = False
                    elif isinstance(value, mx.nd.NDArray):
                        converted = value.as_in_context(mx.cpu()).astype("float32", copy=False)
                        is_same = is_same and converted is value
                        value = converted
                    values.append(value)
                if name in totals:
                    values = [total + value for total, value in zip(totals[name], values)]
                totals[name] = values
        if is_same:
            self.add_up = operator.itemgetter(0)  # with one device there is nothing to add up or to convert
        return totals

    def load_optimizer(self, saved):
        """Load an optimizer's state; its settings are those of this run."""
        trainer = self.optimizer
        optimizer = trainer.optimizer
        if not set(saved["arrays"]) <= set(map(str, range(len(trainer._params)))):
            raise ValueError("the parameters of build_optimizer differ from those of the checkpoint")
        attributes = saved["attributes"]
        for updater, device in zip(trainer._updaters, self.devices):
            for index, state in saved["arrays"].items():
                if isinstance(state, np.ndarray):
                    state = mx.nd.array(state, device, state.dtype)
                else:
                    state = _to_context(state, device)
                updater.states[int(index)] = state
                updater.states_synced[int(index)] = True
            counts = {int(index): count for index, count in attributes["_index_update_count"].items()}
            optimizer._all_index_update_counts[device.device_id] = counts
        optimizer._set_current_context(self.devices[-1].device_id)  # as after a step
        for name, before in saved["numbers_before"].items():
            if attributes[name] != before:
                setattr(optimizer, name, attributes[name])

    def has_finite_weights(self, content):
        """Return whether the weights in the copied content of a checkpoint are finite."""
        arrays, _ = content
        trained = [name for name, each in self.parameters.items() if each.grad_req != "null"]
        return all(np.isfinite(arrays[name]).all() for name in trained if name in arrays)

    def load_weights(self, path):
        """Load a .params file, except layers whose shape differs in the model."""
        weights = _read_weights(path)
        parameters = self.parameters
        fitting = {}
        for name, parameter in parameters.items():
            key = name if name in weights else parameter.name  # the second one is for an exported model
            if key in weights and weights[key].shape == parameter.shape:
                fitting[name] = key
        if not fitting:
            raise UserError(
                f"--weights {path}: no layer fits the model, whose layers are "
                f"{', '.join(list(parameters)[:4])}, ..."
            )
        for name, key in fitting.items():
            parameters[name].set_data(mx.nd.array(weights[key], dtype=parameters[name].dtype))
        self._send_parameters(parameters.values())
        missing = set(parameters) - set(fitting)
        unused = set(weights) - set(fitting.values())
        log_weights(path, len(fitting), missing, unused)

    def export(self, folder):
        """Write the model, which then takes raw pixels, for `SymbolBlock` and SageMaker's MXNet container."""
        network = nn.HybridSequential(prefix="serving_")
        if self._normalize:
            network.add(self._normalize)
        network.add(self.model)
        network.hybridize()
        sample = self._zeros(self.devices[0])
        network(sample)  # traces the network
        network.export(str(folder / "model"), epoch=0)
        _forget_versions(folder / "model-symbol.json")
        mx.nd.load(str(folder / "model-0000.params"))  # MXNet does not notice when the disk is full
        shapes = [{"name": "data", "shape": sample.shape}]
        (folder / "model-shapes.json").write_text(json.dumps(shapes))


def _forget_versions(path):
    """Make the file of a symbol independent of the number of times that MXNet has traced the network."""
    symbol = json.loads(path.read_text())
    for node in symbol["nodes"]:
        node["inputs"] = [[source, output, min(version, 1)] for source, output, version in node["inputs"]]
    path.write_text(json.dumps(symbol, indent=2))


def named_parameters(model):
    """Return Gluon's Parameters by the names that `save_parameters` gives them."""
    named = model._collect_params_with_prefix()
    known = {id(parameter) for parameter in named.values()}
    named.update({each.name: each for each in model.collect_params().values() if id(each) not in known})
    return named


def _to_float32(value):
    """Return outputs of lower precision as float32."""
    if isinstance(value, (list, tuple)):
        return [_to_float32(part) for part in value]
    return value.astype("float32")


def _to_context(state, device):
    """Return an optimizer's state, arrays in lists, as NDArrays in tuples."""
    if isinstance(state, list):
        return tuple(_to_context(part, device) for part in state)
    if isinstance(state, np.ndarray):
        return mx.nd.array(state, device, state.dtype)
    return state


def _read_weights(path):
    """Return the arrays by name of a .params file; nothing in the file is executed."""
    if not path.exists():
        raise UserError(f"--weights {path} does not exist: expected a .params file")
    if path.is_dir():  # a SageMaker channel
        files = sorted(path.glob("*.params"))
        if len(files) != 1:
            raise UserError(f"--weights {path} contains {len(files)} .params files: expected one")
        path = files[0]
    try:
        content = path.read_bytes()
        if content[-len(_CHECKSUM.format(0)) :].startswith(_CHECKSUM[:8].encode()):
            return read_checkpoint(io.BytesIO(content))["model"]
        weights = mx.nd.load_frombuffer(content)
    except Exception as error:  # MXNet and NumPy raise several types of errors for a damaged file
        raise UserError(f"--weights {path} cannot be read: {errors.first_line(error)}") from error
    if not isinstance(weights, dict):
        raise UserError(f"--weights {path} has no names: expected arrays by name")
    prefixes = ("arg:", "aux:")  # of an exported model
    return {name[4:] if name.startswith(prefixes) else name: array for name, array in weights.items()}


class Normalize(gluon.HybridBlock):
    """Turns raw pixels into numbers of zero mean and unit variance. An exported model contains it."""

    def __init__(self, mean, std):
        super().__init__(prefix="normalize_")
        for name, values in (("mean", mean), ("std", std)):
            init = mx.init.Constant(values.reshape(1, -1, 1, 1))
            # Not get_constant(), which writes a memory address into the exported model.
            setattr(self, name, self.params.get(name, shape=init.value.shape, init=init, grad_req="null"))

    def hybrid_forward(self, F, pixels, mean, std):
        """Return (pixels - mean) / std as float32."""
        return F.broadcast_div(F.broadcast_sub(F.cast(pixels, "float32"), mean), std)


class GreyInput(gluon.HybridBlock):
    """A network of the model zoo whose three channels get the same grey image; layers keep their names."""

    def __init__(self, network):
        super().__init__()
        self.features = network.features
        self.output = network.output

    def hybrid_forward(self, F, images):
        """Return the network's outputs for images (n, 1, height, width)."""
        images = F.broadcast_axis(images, axis=1, size=3)
        return self.output(self.features(images))


def zoo_model(name, data):
    """Return a network of Gluon's model zoo, untrained. Grey images are repeated for three channels.

    Raises UserError for an unknown name; the message suggests the nearest ones.
    """
    try:
        network = gluon.model_zoo.vision.get_model(name, classes=data.num_classes)
    except ValueError as error:  # only its message lists the names
        errors.check_choice("--model", name, ["cnn", *str(error).split("\n\t")[1:]])
        raise
    if data.sample_shape[-1] == 1:
        network = GreyInput(network)
    return network


@mx.optimizer.Optimizer.register
class AdamW(mx.optimizer.Optimizer):
    """Adam with decoupled weight decay, https://arxiv.org/abs/1711.05101, which MXNet 1.9.1 lacks.

    The decay is multiplied by the learning rate, as in `torch.optim.AdamW`.
    """

    def __init__(self, beta1=0.9, beta2=0.999, epsilon=1e-8, **settings):
        super().__init__(**settings)
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon

    def create_state(self, index, weight):
        """Return the means of the gradient and of its square, zeros at first."""
        return mx.nd.zeros_like(weight), mx.nd.zeros_like(weight)

    def update(self, index, weight, grad, state):
        """Update a weight in place."""
        self._update_count(index)
        count = self._index_update_count[index]
        learning_rate = self._get_lr(index)
        decay = learning_rate * self._get_wd(index)
        if decay:
            weight *= 1 - decay
        # adam_update has no bias correction: the learning rate and epsilon contain it.
        correction = np.sqrt(1 - self.beta2**count)
        mean, variance = state
        mx.nd.adam_update(
            weight,
            grad,
            mean,
            variance,
            out=weight,
            lr=learning_rate * correction / (1 - self.beta1**count),
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon * correction,
            rescale_grad=self.rescale_grad,
            clip_gradient=-1 if self.clip_gradient is None else self.clip_gradient,
        )


# Several workers --------------------------------------------------------------------------------------------

# On import, MXNet reads from a variable whether the process is a server. The process ends when its standard
# input is closed, so that it never outlives its worker.
_SERVER = """
import sys
sys.path[:] = {!r}
import os, threading
threading.Thread(target=lambda: os._exit(len(os.read(0, 1))), daemon=True).start()
import numpy
numpy.bool = bool
import mxnet
"""


class ParameterServers:
    """Adds up gradients over all workers by MXNet's parameter servers, bit-identical in each run.

    Gluon's Trainer is sometimes wrong with several workers: it does not wait for the first weights before it
    sends gradients, which then replace the weights. Here the servers only return sums.

    Each worker has a server, and the main process has a scheduler. A single worker has neither.
    """

    def __init__(self, workers):
        self.workers = workers
        self._store = None  # the connection to the servers
        self._pairs = []  # for each parameter an array (pairs of workers, *shape)
        if workers.size == 1:
            return
        if "DMLC_ROLE" in os.environ:
            raise UserError("MXNet trains with several workers only once in a process: start a new process")
        with socket.create_server((workers.address, 0)) as free:
            port = workers.all_gather(free.getsockname()[1])[0]
        os.environ.update(
            DMLC_ROLE="worker",
            DMLC_PS_ROOT_URI=workers.main_address,
            DMLC_PS_ROOT_PORT=str(port),
            DMLC_NODE_HOST=workers.address,
            DMLC_NUM_WORKER=str(workers.size),
            DMLC_NUM_SERVER=str(workers.size),
        )
        if workers.is_main_process:
            self._start_process("scheduler")
        self._start_process("server")
        self._store = mx.kv.create("dist_sync")  # waits for all of them
        # At exit no worker waits for the others, which may be gone: the servers end with their workers.
        mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(self._store.handle, 0))
        atexit.register(self._close)  # before MXNet shuts down

    def add_up(self, gradients):
        """Replace each gradient by the sum over all workers.

        A server adds in the order of arrival. Only a sum of two terms has the same bits in any order. So the
        servers add up pairs of workers, and each worker adds up the pairs. With n workers this sends n/2
        times the bytes of a plain sum.

        Args:
            gradients: a list for each parameter with its gradient, once for each device of this worker.
        """
        if not self._pairs:
            num_pairs = (self.workers.size + 1) // 2
            self._pairs = [mx.nd.zeros((num_pairs, *copies[0].shape)) for copies in gradients]
            first = [array.copy() for array in self._pairs]  # MXNet writes to this array
            self._store.init(list(range(len(first))), first)
        for key, (copies, pairs) in enumerate(zip(gradients, self._pairs)):
            # MXNet orders the operations on one array: each push waits for the pull of the previous step.
            # Otherwise a server would count this worker twice. A new array in each step would not wait.
            pairs[:] = 0
            copies[0].copyto(pairs[self.workers.rank // 2])
            self._store.pushpull(key, pairs, priority=-key)
            total = pairs[0]
            for pair in range(1, len(pairs)):
                total = total + pairs[pair]
            for copy in copies:
                total.copyto(copy)

    def _close(self):
        self._store = None

    def _start_process(self, role):
        """Start a scheduler or a server in a separate process; if it ends early, this worker ends too.

        Signals to the process group do not reach it, because saving the state needs it.
        """
        signals = set(preemption.NUMBERS)
        command = [sys.executable, "-c", _SERVER.format(sys.path)]
        environment = {**os.environ, "DMLC_ROLE": role}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the new process inherits that
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)  # noqa: S603
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        threading.Thread(target=self._watch, args=(role, process), daemon=True).start()

    def _watch(self, role, process):
        reason = f"MXNet's {role} has ended with exit code {process.wait()}: see the log"
        try:
            self.workers.fail(reason)
            errors.fail(reason)
        finally:
            os._exit(1)  # the main thread may be waiting for it forever


# Reading data -----------------------------------------------------------------------------------------------


def seed_sample(seed):
    """Seed the random numbers that a data set draws, such as those of Gluon's transforms."""
    mx.random.seed(seed)


def to_array(sample):
    """Return a sample as a NumPy array; a 3-D NDArray of floats has the channels first."""
    if not isinstance(sample, mx.nd.NDArray):
        return np.asarray(sample)
    array = sample.asnumpy()
    return array.transpose(1, 2, 0) if _has_channels_first(array) else array


def _has_channels_first(sample):
    """Return whether a sample has the layout of Gluon's `ToTensor`, which images of uint8 do not have."""
    return sample.ndim == 3 and np.dtype(sample.dtype).kind == "f"


def to_device(value):
    """Return a number as it is and a list as an array on the CPU."""
    return mx.nd.array(value) if isinstance(value, list) else value


def load_with_processes(loader, steps, num_processes):
    """Return an iterator over `loader(step)` for each step in order, loaded between the steps."""
    return map(loader, steps)


# Checkpoints ------------------------------------------------------------------------------------------------
# In MXNet's own format, for mx.nd.load and load_parameters(path, ignore_extra=True). They are not written by
# mx.nd.save, which does not notice a full disk, nor by Trainer.save_states, which writes a pickle.

_ARRAY = "__array__"  # the key that replaces an array; the value is the array's name
_CHECKSUM = "CRC-32: {:08x}"
_TYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64")  # by MXNet's numbers


def copy_to_host(content, memory, prefix=None):
    """Return copies of the arrays of `content` by name, and `content` with names instead of its arrays.

    Args:
        content: dictionaries, lists and tuples, NDArrays and plain values. Other objects are left out.
        memory: the copies by name, reused by the next save.
        prefix: of the names of nested values; None for the whole content.
    """
    if isinstance(content, mx.nd.NDArray):
        name = prefix[:-1]
        if name not in memory:
            memory[name] = np.empty(content.shape, content.dtype)
        content.copyto(mx.nd.from_numpy(memory[name]))
        return {_ARRAY: name}
    if isinstance(content, (list, tuple)):
        return [copy_to_host(value, memory, f"{prefix}{index}/") for index, value in enumerate(content)]
    if not isinstance(content, dict):
        return content if isinstance(content, (str, int, float)) else None
    if prefix is not None:
        return {key: copy_to_host(value, memory, f"{prefix}{key}/") for key, value in content.items()}
    mx.nd.waitall()  # with static memory the statistics would be those of an earlier step
    facts = {}
    for key, value in content.items():  # the weights have the names that save_parameters gives them
        facts[key] = copy_to_host(value, memory, "" if key == "model" else f"{key}/")
    mx.nd.waitall()
    return memory, facts


def write_checkpoint(content, file):
    """Write the result of `copy_to_host`, followed by a checksum, which MXNet does not read.

    The format is that of `mx.nd.save`, see NDArray::Save in MXNet's src/ndarray/ndarray.cc; little-endian.
    """
    arrays, facts = content
    arrays = {**arrays, "json": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays))]  # of a list of arrays
    for array in arrays.values():
        parts.append(struct.pack("<Iii", 0xF993FAC9, 0, array.ndim))  # version 2, dense
        parts.append(struct.pack(f"<{array.ndim}q", *array.shape))
        parts.append(struct.pack("<iii", 1, 0, _TYPES.index(array.dtype.name)))  # in the memory of the CPU
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    parts.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        parts.append(struct.pack("<Q", len(name.encode())) + name.encode())
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
        file.write(part)
    file.write(_CHECKSUM.format(checksum).encode())


def read_checkpoint(file):
    """Return the content of a checkpoint, with its arrays in their places; nothing in it is executed."""
    end = file.seek(max(0, file.seek(0, os.SEEK_END) - len(_CHECKSUM.format(0))))
    whole = b""
    if file.read().startswith(_CHECKSUM[:8].encode()):  # otherwise it may be of any size
        file.seek(0)
        whole = file.read()
    # MXNet's own reader accepts many damaged files, and crashes on others.
    if whole[end:] != _CHECKSUM.format(zlib.crc32(whole[:end])).encode():
        raise ValueError("its checksum is wrong: the file is damaged, or not a checkpoint of this script")
    arrays = {name: array.asnumpy() for name, array in mx.nd.load_frombuffer(whole).items()}
    content = json.loads(arrays.pop("json").tobytes())
    if not isinstance(content, dict) or not isinstance(content.get("progress"), dict):
        raise ValueError("it is not a checkpoint of this script")
    containers = [content]
    for container in containers:  # which grows
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(items):
            if isinstance(value, dict) and list(value) == [_ARRAY]:
                container[key] = arrays[value[_ARRAY]]
            elif isinstance(value, (dict, list)):
                containers.append(value)
    return content


def describe_machine(args):
    """Return the facts that change the bits of the result, but not its quality."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = int(threads) if threads.isdigit() and int(threads) else machine.num_cores()
    return {
        "CPU threads": num_threads,
        "number of devices": len(_find_devices(args)),
        FRAMEWORK: VERSION,
    }
