"""Device, precision, several GPUs and hosts, Keras' own loop, and checkpoint files for `train.py`.

Nothing here is specific to a model. `common/run.py` calls the functions; the training state in `train.py`
inherits from `State`.
"""

import contextlib
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common import atomic_io, batches, datasets, errors, machine, model_folder, quiet, self_check
from common.errors import UserError
from common.report import log, log_weights

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # otherwise every start reports missing GPUs

missing = errors.importing(
    "TensorFlow",
    "Activate its environment (source .venv/bin/activate), or install it: pip install tensorflow",
)
with missing, quiet.without_lines(quiet.TENSORFLOW):
    import h5py
    import keras
    import tensorflow as tf
    from keras.src.saving import saving_lib
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter
    from tensorflow.core.protobuf import fingerprint_pb2

CHECKPOINT = "checkpoint-{}.keras"
FIRST_NUMBER = 1  # in the name of the checkpoint after the first epoch
FRAMEWORK = "tensorflow"
VERSION = str(tf.__version__)
SERVING_REQUIREMENTS = "numpy", "pillow"  # SageMaker's container for SavedModels installs these

POLICIES = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
SEEDS_PER_REPLICA = 2**20
KERAS_PLACE = r"Exception encountered when calling .*|\x1b\[\dm"  # prefix of the reason, and ANSI codes


def start(args, workers):
    """Return the tf.distribute.Strategy to train with, after connecting the workers.

    The device changes only the speed, not the data or the number of epochs.
    """
    keras.utils.clear_session(free_memory=False)  # give layers the same names in each training of a process
    gpus = [] if args.device == "cpu" else tf.config.list_physical_devices("GPU")[: args.num_gpus]
    _check_flags(args, gpus)
    # Each GPU needs a sample, and a batch may be half full.
    gpus = gpus[: max(1, args.batch_size // 2 // workers.size)]
    if tf.config.get_visible_devices("GPU") != gpus:
        tf.config.set_visible_devices(gpus, "GPU")
    if args.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(POLICIES[args.precision])
    devices = [f"GPU:{index}" for index in range(len(gpus))] or _logical_cpus()
    device = f"{len(gpus)} GPU" if gpus else "cpu"
    if not gpus and len(devices) > 1:
        device = f"{len(devices)} cpu"
    shards = workers.describe_shards(args.batch_size, "samples of a batch")
    log(f"Device: {device} ({args.precision}){shards}")
    if workers.size > 1:
        return _connect(len(gpus), workers)
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def _check_flags(args, gpus):
    if args.device == "cuda" and not gpus:
        raise UserError("--device cuda: TensorFlow finds no GPU; use --device auto or cpu")
    if args.precision == "fp16" and not gpus:
        raise UserError("--precision fp16: TensorFlow has it on GPUs only; use --precision bf16 or fp32")
    if args.compile and (args.deterministic or len(gpus) > 1 or len(args.hosts) > 1):
        raise UserError(
            "--compile: XLA supports neither deterministic max pooling nor several devices here: "
            "add --no-deterministic, and use one host and --num-gpus 1"
        )


def _logical_cpus():
    """Return the logical devices of a divided CPU, which tests use like several GPUs."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configurations = tf.config.get_logical_device_configuration(cpu) or []
    return [f"CPU:{index}" for index in range(len(configurations))]


def _connect(num_gpus, workers):
    """Start TensorFlow's collectives, which sum gradients over all workers with `num_gpus` GPUs each."""
    workers.check_same({"number of GPUs (--num-gpus)": num_gpus})
    with socket.create_server((workers.address, 0)) as free:
        port = free.getsockname()[1]
    addresses = workers.all_gather(f"{workers.address}:{port}")
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": workers.rank}}
    os.environ["TF_CONFIG"] = json.dumps(config)
    return tf.distribute.MultiWorkerMirroredStrategy()


class State:
    """The training state shared by all models: devices, workers, and the functions of a step.

    A subclass sets `model`, compiled, and `callbacks`, and then calls `prepare`.

    Attributes:
        strategy: the result of `start`. Each of its devices is a replica with a copy of the model.
        steps_per_epoch: the number of steps in an epoch.
        learning_rate: the optimizer's, before the first step; None for a schedule.
        metrics: the variables of the metrics of the running epoch; their last values during the validation.
        job: what identifies the job, besides the flags and the data.
        model_facts: what `model.json` says about the model, besides the data.
    """

    def __init__(self, args, run, data):
        self.args = args
        self.run = run
        self.data = data
        self.workers = run.workers
        self.strategy = run.device
        self.num_replicas = self.strategy.num_replicas_in_sync
        keras.utils.set_random_seed(args.seed)  # of the initial weights and of dropout
        self.steps_per_epoch = num_batches(args, data.train)
        self.batch_size = None  # the number of samples in the running step, if they come from a Stream
        self.mean_count = 0.0  # the same divided by the number of replicas
        self.has_weights = False
        if args.augment and isinstance(data.train, Stream):
            log("Warning: --augment does nothing for a tf.data.Dataset: its samples change in load_data only")

    @contextlib.contextmanager
    def scope(self):
        """Build the model for all devices inside this block.

        Raises UserError if the model cannot take samples of this shape.
        """
        try:
            with self.strategy.scope():
                yield
        except ValueError as error:
            if not re.search("negative|at least|too small", str(error), re.IGNORECASE):
                raise
            size = "x".join(map(str, self.data.sample_shape))
            reason = errors.first_line(re.sub(KERAS_PLACE, "", str(error)))
            raise UserError(
                f"--model {self.args.model} cannot take images of {size} ({reason}): "
                "pass --image-size, such as 224"
            ) from error

    def prepare(self):
        """Create the functions that Keras calls for each step, and all variables for `restore`."""
        model = self.model
        sample = self._one_sample()
        with self.strategy.scope():
            if not getattr(model, "inputs", None):  # a subclass: the first call makes its variables
                model(sample[0])
            model.optimizer.build(model.trainable_variables)
        # Keras would compile a function for each size of a batch, and another one for all sizes. The
        # size that came first would decide which of them computes a batch, and so its last bits.
        self.spec = tuple(tf.TensorSpec([None, *array.shape[1:]], array.dtype) for array in sample)
        if self.num_replicas == 1:
            model.train_function = self._compile(model.train_step)
            model.test_function = self._compile(model.test_step)
        else:
            is_own = type(model).train_step is not keras.Model.train_step
            model.train_function = self._compile_for_replicas(
                model.train_step if is_own else self._train_step
            )
            model.test_function = self._compile_for_replicas(model.test_step)
        self.mean_count = 1.0
        self.learning_rate = self._read_learning_rate()
        one_per_replica = [np.repeat(array, self.num_replicas, axis=0) for array in sample]
        model.test_on_batch(*one_per_replica)  # creates the variables of the metrics
        model.reset_metrics()
        self.find_metrics()
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        structure = model_folder.describe_structure(_describe_layers(model))
        self.job = {"optimizer": type(optimizer).__name__, model_folder.STRUCTURE: structure}
        self.run.saver.memory["archive"] = Archive(model)

    def _one_sample(self):
        """Return arrays (samples, labels) or (samples, labels, weights) of one validation sample."""
        self.has_weights = _has_weights(self.data.train) or _has_weights(self.data.validation)
        engine = sys.modules[__name__]
        arrays = batches.read_samples(self.data.validation, np.arange(1), engine, (self.args.seed,))
        return arrays if self.has_weights else arrays[:2]

    def _compile(self, step):
        """Return a function that takes a batch from an iterator and runs `step` with it."""
        compiled = step
        if not self.model.run_eagerly:
            compiled = tf.function(step, [self.spec], autograph=False, jit_compile=self.args.compile or None)

        def run_step(iterator):
            batch = next(iterator)
            return compiled(batch[: len(self.spec)])  # Keras may have added None instead of weights

        return run_step

    def _compile_for_replicas(self, step):
        """Return a function that takes a batch from an iterator and runs `step` on all replicas."""
        num_local = self.num_replicas // self.workers.size

        @tf.function(input_signature=[self.spec, tf.TensorSpec([], "float32")], autograph=False)
        def compiled(batch, mean_count):
            outputs = self.strategy.run(run_on_replica, (batch, mean_count))
            return tf.nest.map_structure(average, outputs)

        def run_on_replica(batch, mean_count):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group % num_local
            with tf.device("CPU:0"):  # each GPU gets only its part
                count = tf.shape(batch[0])[0]
                part = slice(count * replica // num_local, count * (replica + 1) // num_local)
                batch = tuple(tensor[part] for tensor in batch)
            if step == self._train_step:
                return step(batch, mean_count)
            return step(batch)

        def average(value):
            values = self.strategy.experimental_local_results(value)
            return tf.add_n(values) / len(values)

        def run_step(iterator):
            batch = next(iterator)
            return compiled(batch[: len(self.spec)], self.mean_count)

        return run_step

    def _train_step(self, data, mean_count):
        """Train like `keras.Model.train_step`, for replicas with different numbers of samples.

        Args:
            data: the samples of this replica.
            mean_count: the number of samples per replica, on average.
        """
        model = self.model
        samples, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        count = tf.shape(tf.nest.flatten(samples)[0])[0]
        factor = tf.cast(count, "float32") / mean_count
        if getattr(model.loss, "reduction", None) == "sum":
            factor = 1.0
        options = {"training": True} if "training" in inspect.signature(model.call).parameters else {}
        with tf.GradientTape() as tape:
            outputs = model(samples, **options)
            loss = model.compute_loss(samples, labels, outputs, weights, training=True)
            scaled_loss = model.optimizer.scale_loss(loss * factor)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            # An overflow on one replica makes all of them skip the step: the sum is 0 or else not a number.
            overflow = tf.add_n(
                [tf.reduce_sum(0 * gradient) for gradient in gradients if gradient is not None]
            )
            overflow = tf.distribute.get_replica_context().all_reduce("SUM", overflow)
            gradients = [gradient if gradient is None else gradient + overflow for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)  # adds them up over all replicas
        tracker = next(metric for metric in model.metrics if metric.name == "loss")
        tracker.update_state(loss * self.num_replicas, sample_weight=count)
        return model.compute_metrics(samples, labels, outputs, sample_weight=weights)

    # Keras' loop --------------------------------------------------------------------------------------------

    def finish_epoch(self, training, validation):
        """Finish the epoch that was interrupted; return the epoch at which `model.fit` starts.

        Args:
            training, validation: the batches, as for `model.fit`.
        """
        self.run.defer_signals()
        progress, model, callbacks = self.run.progress, self.model, self.callbacks
        rate = model.optimizer.learning_rate
        rate = rate.numpy() if isinstance(rate, keras.Variable) else None
        metrics = self.metrics
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(progress.epoch)
        callbacks.load()  # again, like the learning rate: the epoch started before the interruption
        if rate is not None:
            model.optimizer.learning_rate = rate
        self._load_metrics(metrics)
        steps = iter(training)
        for step in range(progress.step, self.steps_per_epoch):
            callbacks.on_train_batch_begin(step)
            logs = model.train_function(steps)
            callbacks.on_train_batch_end(step, logs)
            if model.stop_training:
                break
        logs = model.get_metrics_result()
        validation_logs = model.evaluate(validation, callbacks=callbacks, return_dict=True)
        logs.update({f"val_{name}": value for name, value in validation_logs.items()})
        callbacks.on_epoch_end(progress.epoch, logs)
        return self.args.epochs if model.stop_training else progress.epoch

    def metric_sums(self):
        """Return this worker's metrics of the running epoch, as pairs that can be added up over workers."""
        if not self.run.progress.step:
            return {}
        return {f"{index}": (np.asarray(value), 0) for index, value in enumerate(self.metrics)}

    def read_metrics(self):
        """Return the metrics of the running epoch, by name."""
        return {name: float(np.mean(value)) for name, value in self.model.get_metrics_result().items()}

    def _load_metrics(self, values):
        """Load the metrics of the interrupted epoch from `values`, or from those of each worker in Run."""
        sums = self.run.progress.sums
        if sums:
            values = [np.asarray(sums[f"{index}"][0]) for index in range(len(sums))]
        elif not self.workers.is_main_process:
            values = [0 * value for value in values]  # the number of workers has changed
        if len(values) != len(self.metrics):
            raise UserError("the number of GPUs has changed inside an epoch: use the same number as before")
        for part, value in zip(self.metrics, values):
            part.assign(value)

    def find_metrics(self):
        """Set `metrics` to the metric variables of each replica of this worker, to be summed."""
        self.metrics = []
        for variable in self.model.metrics_variables:
            self.metrics += self.strategy.experimental_local_results(variable.value)

    # Variables ----------------------------------------------------------------------------------------------

    def has_finite_weights(self, content):
        """Return whether the weights in the copied content of a checkpoint are finite."""
        arrays, _, _ = content
        trained = {id(variable) for variable in self.model.trainable_variables}
        indices = [index for index, variable in enumerate(self.model.variables) if id(variable) in trained]
        saved = [arrays[f"model/{index}"] for index in indices if f"model/{index}" in arrays]
        return all(np.isfinite(array).all() for array in saved)

    def assign(self, variables, values):
        """Set variables to the values from a checkpoint."""
        if len(variables) != len(values):
            raise ValueError(f"it has {len(values)} arrays, but there are {len(variables)} variables")
        for variable, value in zip(variables, values):
            variable.assign(value)

    def _read_learning_rate(self):
        """Return the optimizer's learning rate; None for a schedule."""
        rate = self.model.optimizer.learning_rate
        return float(rate.numpy()) if isinstance(rate, keras.Variable) else None

    def load_optimizer(self, values, learning_rate):
        """Set the optimizer's variables; the learning rate is this run's unless a callback has changed it.

        Args:
            values: those of the variables, from a checkpoint.
            learning_rate: that of the earlier run before the first step.
        """
        optimizer = self.model.optimizer
        self.assign(optimizer.variables, values)
        if self.learning_rate is not None and self._read_learning_rate() == learning_rate:
            optimizer.learning_rate = self.learning_rate

    def _seeds(self):
        return [variable for variable in self.model.variables if "seed_generator_state" in variable.path]

    def spread_seeds(self):
        """Seed dropout differently on each replica; the checkpoint contains the seed of the first one."""
        if self.num_replicas == 1:
            return
        for variable in self._seeds():
            replicas = self.strategy.experimental_local_results(variable.value)
            seed, count = replicas[0].numpy()
            first = self.workers.rank * len(replicas)
            for index, replica in enumerate(replicas):
                replica.assign([seed + (first + index) * SEEDS_PER_REPLICA, count])

    @property
    def restored_epoch(self):
        """The epoch from which EarlyStopping has restored the best weights at the end; None without it."""
        return self.callbacks.restored_epoch()

    def export(self, folder):
        """Write a SavedModel that takes batches of any size of `pixels`, as they are in the files.

        Its signatures are `serving_default` for float32, as TensorFlow Serving converts JSON numbers, and
        for images of uint8 also `serving_uint8`. They return `logits`, `class`, `class_name` and
        `probability` for a classifier, otherwise the outputs of the network.
        """
        for variable in self._seeds():  # dropout's counters are not part of the model
            variable.assign([variable.numpy()[0], 0])
        data, model = self.data, self.model
        outputs = model(np.zeros((1, *data.sample_shape), data.dtype), training=False)
        array = np.asarray(outputs, np.float32) if isinstance(outputs, tf.Tensor) else None
        kind = model_folder.describe_outputs(array, data.classes)
        self.model_facts = {"outputs": kind}

        def answer(pixels):
            if data.dtype == np.uint8 and pixels.dtype != tf.uint8:
                pixels = tf.round(pixels)
            samples = tf.saturate_cast(pixels, str(data.dtype))
            return _name_outputs(model(samples, training=False), kind, data.classes)

        signatures = {"serving_default": tf.float32, "serving_uint8": tf.uint8}
        if data.dtype != np.uint8:
            del signatures["serving_uint8"]
        for name, dtype in signatures.items():
            spec = tf.TensorSpec((None, *data.sample_shape), dtype, name="pixels")
            signatures[name] = tf.function(answer, input_signature=[spec])
        # Not Keras' own export, which writes the variables in a different order each time.
        module = tf.Module()
        module.weights = [variable.value for variable in model.variables]
        tf.saved_model.save(module, str(folder), signatures)
        _fix_fingerprint(folder / "fingerprint.pb")

    def share_statistics(self):
        """Copy the batch-normalization statistics of the first replica to all; checkpoints contain these."""
        if self.num_replicas == 1:
            return
        seeds = {id(variable) for variable in self._seeds()}
        for variable in self.model.non_trainable_variables:
            if id(variable) not in seeds:
                content = self.workers.broadcast(variable.numpy().tobytes())
                variable.assign(np.frombuffer(content, variable.dtype).reshape(variable.shape))

    def load_weights(self, path):
        """Load a .keras or .weights.h5 file, except layers whose shape differs in the model."""
        weights = _read_weights(path)
        own = _own_weights(self.model)
        fitting = {
            name: array for name, array in weights.items() if name in own and own[name].shape == array.shape
        }
        if not fitting:
            raise UserError(
                f"--weights {path}: no layer fits the model, whose layers are {', '.join(list(own)[:4])}, ..."
            )
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder, "merged.weights.h5")
            self.model.save_weights(merged)
            with h5py.File(merged, "r+") as file:
                for name, array in fitting.items():
                    file[name][...] = array
            self.model.load_weights(merged)
        log_weights(path, len(fitting), set(own) - set(fitting), set(weights) - set(fitting))


def _name_outputs(outputs, kind, classes):
    """Return the outputs of a network by name, with class and probability for a classifier."""
    if kind == "values":
        if isinstance(outputs, dict):
            return outputs
        parts = tf.nest.flatten(outputs)
        return (
            {"outputs": parts[0]}
            if len(parts) == 1
            else {f"output_{i}": part for i, part in enumerate(parts)}
        )
    outputs = tf.cast(outputs, "float32")
    probabilities = tf.nn.softmax(outputs) if kind == "logits" else outputs
    best = tf.argmax(probabilities, 1)
    return {
        kind: outputs,
        "class": best,
        "class_name": tf.gather(tf.constant(classes), best),
        "probability": tf.reduce_max(probabilities, 1),
    }


def _fix_fingerprint(path):
    """Replace the random number in the fingerprint of a SavedModel, so that equal models have equal files."""
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    fingerprint.uuid = str(fingerprint.saved_model_checksum)
    path.write_bytes(fingerprint.SerializeToString(deterministic=True))


# In the configuration of a layer: what depends on the process, the flags or the data.
_NO_STRUCTURE = {"name", "dtype", "seed", "module", "registered_name", "shared_object_id", "mean", "variance"}


def _describe_layers(model):
    """Return lines about the layers, how they are connected, and their weights."""
    layers = list(model._flatten_layers())
    names = {layer.name: f"layer {number}" for number, layer in enumerate(layers)}
    lines = []
    for layer in layers:
        try:
            config = _structure_of(layer.get_config(), names)
        except (NotImplementedError, TypeError):  # a subclass with its own arguments
            config = None
        lines.append(f"{type(layer).__name__} {json.dumps(config, sort_keys=True, default=repr)}")
    return lines + [str(tuple(weight.shape)) for weight in model.weights]


def _structure_of(config, names):
    """Return part of a configuration, with numbers instead of the `names` of layers, which contain counters.

    The code of a lambda is left out, because it differs between versions of Python.
    """
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__":
            return "lambda"
        kept = {str(key): value for key, value in config.items() if key not in _NO_STRUCTURE}
        return {key: _structure_of(value, names) for key, value in kept.items()}
    if isinstance(config, (list, tuple)):
        return [_structure_of(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config


def _own_weights(model):
    """Return the weights of a model by their names in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "own.weights.h5")
        model.save_weights(path)
        return _read_hdf5(path)


def _read_weights(path):
    """Return the weights by name of a .keras or .weights.h5 file; nothing in the file is executed."""
    if not path.exists():
        raise UserError(f"--weights {path} does not exist: expected a .keras or .weights.h5 file")
    if path.is_dir():  # a SageMaker channel
        files = sorted([*path.glob("*.keras"), *path.glob("*.weights.h5")])
        if len(files) != 1:
            raise UserError(
                f"--weights {path} contains {len(files)} .keras or .weights.h5 files: expected one"
            )
        path = files[0]
    try:
        if path.name.endswith(".h5"):
            return _read_hdf5(path)
        with zipfile.ZipFile(path) as archive:
            content = archive.read("model.weights.h5")
        return _read_hdf5(io.BytesIO(content))
    except Exception as error:  # h5py and zipfile raise many types of errors for a damaged file
        raise UserError(f"--weights {path} cannot be read: {errors.first_line(error)}") from error


def _read_hdf5(file):
    """Return the arrays of the layers in an HDF5 file, without the optimizer's and dropout's seeds."""
    arrays = {}
    with h5py.File(file, "r") as content:
        for name, item in _hdf5_items(content).items():
            is_weight = name.startswith(("layers/", "_layer", "vars/")) or "/vars/" in name
            is_other = name.startswith("optimizer/") or "seed_generator" in name
            if isinstance(item, h5py.Dataset) and is_weight and not is_other:
                arrays[name] = item[()]
    return arrays


def zoo_model(name, data, pixels):
    """Return the logits of an untrained network of keras.applications. Grey images get three channels.

    Args:
        name: such as MobileNetV2; the UserError for an unknown name suggests the nearest ones.
        data: what `run.load_data` returns.
        pixels: the normalized images, a Keras tensor.
    """
    names = [name for name in dir(keras.applications) if name[0].isupper()]
    errors.check_choice("--model", name, ["cnn", *names])
    build = getattr(keras.applications, name)
    height, width, channels = data.sample_shape
    if channels == 1:
        pixels = keras.layers.Concatenate()([pixels] * 3)
    options = {"input_shape": (height, width, 3), "classes": data.num_classes, "classifier_activation": None}
    if "include_preprocessing" in inspect.signature(build).parameters:
        options["include_preprocessing"] = False
    elif name.startswith("EfficientNet"):
        pixels = keras.layers.Rescaling(255.0)(pixels)  # the network itself divides by it
    outputs = build(weights=None, **options)(pixels)
    return keras.layers.Activation("linear", dtype="float32")(outputs)


# Callbacks --------------------------------------------------------------------------------------------------

STATES = {  # the attributes of Keras' own callbacks that change in a training
    keras.callbacks.EarlyStopping: ("wait", "best", "best_epoch", "stopped_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch"),
}
BATCH_HOOKS = ("on_batch_begin", "on_batch_end")
BATCH_HOOKS += ("on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end")


class Callbacks(keras.callbacks.CallbackList):
    """Calls the user's callbacks, then saves and logs, and ends the training after a signal.

    Args:
        callbacks: a list of Keras callbacks.
        state: the training state, with a compiled `model`.

    Attributes:
        states: for the checkpoint, the state of each callback as a dictionary of plain values.
        best_weights: for the checkpoint, the arrays of EarlyStopping(restore_best_weights=True).
    """

    def __init__(self, callbacks, state):
        self.state = state
        self.run = state.run
        self.states = []
        self.best_weights = []
        self._own = list(callbacks)
        self._attributes = {}
        self._has_begun = False
        _check_callbacks(self._own, state.model.optimizer)
        hooks = [getattr(type(callback), name) for callback in self._own for name in BATCH_HOOKS]
        defaults = [getattr(keras.callbacks.Callback, name) for name in BATCH_HOOKS]
        self._has_batch_hooks = not set(defaults).issuperset(hooks)
        super().__init__(callbacks, add_history=True, model=state.model)
        self.set_params({"epochs": state.args.epochs, "steps": state.steps_per_epoch, "verbose": 0})

    def on_train_begin(self, logs=None):
        """Start the training once, with the callbacks in the state of the newest checkpoint."""
        if self._has_begun:
            return
        self._has_begun = True
        self.state.find_metrics()
        names = [type(callback).__name__ for callback in self._own]
        if self.states and names != [saved["name"] for saved in self.states]:
            log("Warning: the callbacks have changed, and start without state")
            self.states = []
        self._load_files()
        super().on_train_begin(logs)
        self.load()
        self._keep()
        self.state.spread_seeds()
        for callback in self._own:
            if not isinstance(callback, SAVED) and not hasattr(callback, "state_dict"):
                self._attributes[callback] = _attributes(callback)

    def on_train_batch_end(self, batch, logs=None):
        """Save a checkpoint if one is due, and end the training after a signal."""
        if self._has_batch_hooks:  # otherwise the numbers stay on the device, and no step waits for it
            super().on_train_batch_end(batch, logs)
            self._keep()
        self.run.finish_step({}, self.state.batch_size)

    def on_test_begin(self, logs=None):
        """Keep the metrics of the training, which Keras resets for the validation."""
        self.state.metrics = [part.numpy() for part in self.state.metrics]
        self.state.share_statistics()
        super().on_test_begin(logs)

    def on_test_batch_end(self, batch, logs=None):
        """End the training after a signal."""
        if self._has_batch_hooks:
            super().on_test_batch_end(batch, logs)
        self.run.finish_validation_step({})

    def on_test_end(self, logs=None):
        """Continue with the metrics of the training."""
        super().on_test_end(logs)
        self.state.find_metrics()

    def on_epoch_end(self, epoch, logs=None):
        """Save a checkpoint with the new state of the user's callbacks, and log the metrics."""
        super().on_epoch_end(epoch, logs)
        self._keep()
        self._report_unsaved()
        self.run.progress.stopped = self.model.stop_training
        values = {name: float(np.mean(value)) for name, value in logs.items()}  # the mean of a vector
        names = [name for name in values if not name.startswith("val_")]
        training = {name: values[name] for name in names}
        validation = {name: values[f"val_{name}"] for name in names if f"val_{name}" in values}
        self.model.stop_training = self.run.finish_epoch(training, validation)

    # The callbacks' state -----------------------------------------------------------------------------------

    def load(self):
        """Restore the state of the callbacks from the checkpoint, after they have reset it."""
        for callback, saved in zip(self._own, self.states):
            if hasattr(callback, "load_state_dict"):
                callback.load_state_dict(saved["state"])
            elif not isinstance(callback, keras.callbacks.CSVLogger):
                for name, value in saved["state"].items():
                    setattr(callback, name, value)
        stopping = [callback for callback in self._own if _restores_weights(callback)]
        for index, callback in enumerate(stopping):
            count = len(self.best_weights) // len(stopping)
            callback.best_weights = self.best_weights[index * count : (index + 1) * count] or None

    def restored_epoch(self):
        """Return the epoch of the weights that EarlyStopping restores at the end; None without it."""
        for callback in reversed(self._own):
            if _restores_weights(callback) and callback.best_weights:
                return callback.best_epoch + 1
        return None

    def _load_files(self):
        """Restore the CSV files; otherwise a repeated epoch would be in them twice."""
        for callback, saved in zip(self._own, self.states):
            if isinstance(callback, keras.callbacks.CSVLogger):
                Path(callback.filename).write_bytes(saved["state"]["content"].encode())
                callback.append = True

    def _keep(self):
        """Keep the state of the callbacks for the next checkpoint."""
        self.states = []
        self.best_weights = []
        for callback in self._own:
            self.states.append({"name": type(callback).__name__, "state": _state_of(callback)})
            if _restores_weights(callback):
                self.best_weights += callback.best_weights or []

    def _report_unsaved(self):
        """Log once which callbacks have changed attributes that no checkpoint contains."""
        changed = []
        for callback, before in self._attributes.items():
            after = _attributes(callback)
            names = [name for name in after if after[name] != before.get(name)]
            if names:
                changed.append(f"{type(callback).__name__} ({', '.join(names)})")
        self._attributes = {}
        if changed:
            log(
                f"Warning: no checkpoint holds the state of {', '.join(changed)}: it is lost after an "
                "interruption, unless the class has the methods state_dict() and load_state_dict(state)"
            )


SAVED = (*STATES, keras.callbacks.CSVLogger)


def _check_callbacks(callbacks, optimizer):
    """Raise UserError for unsupported callbacks."""
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise UserError(
                f"{name} would overwrite the weights of a checkpoint: remove it, the script resumes by itself"
            )
        sets_rate = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)
        if isinstance(callback, sets_rate) and not isinstance(optimizer.learning_rate, keras.Variable):
            raise UserError(
                f"{name} sets the learning rate, which has a schedule: remove one of them, such as by "
                "--schedule constant and --warmup-epochs 0"
            )


def _state_of(callback):
    """Return the state of a callback in plain values and arrays."""
    if hasattr(callback, "state_dict"):
        return callback.state_dict()
    if isinstance(callback, keras.callbacks.CSVLogger):
        path = Path(callback.filename)
        return {"content": path.read_bytes().decode() if path.exists() else ""}
    for kind, names in STATES.items():
        if isinstance(callback, kind):
            return {name: getattr(callback, name) for name in names if hasattr(callback, name)}
    return {}


def _has_weights(dataset):
    """Return whether a data set has a weight for each sample."""
    if isinstance(dataset, Stream):
        return len(dataset.element_spec) == 3
    return len(dataset[0]) == 3


def _restores_weights(callback):
    return isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights


def _attributes(callback):
    """Return the comparable attributes of a callback."""
    plain = (bool, int, float, str, list, tuple, dict, set, np.ndarray, type(None))
    return {
        name: repr(value) if isinstance(value, plain) else id(value)
        for name, value in vars(callback).items()
        if name not in ("_model", "params", "validation_data")
    }


# Reading data -----------------------------------------------------------------------------------------------


class Batches(DataAdapter, tf.distribute.DistributedDataset):
    """The data for Keras: an iterable over tensors (samples, labels) or (samples, labels, weights)."""

    has_partial_batch = partial_batch_size = batch_size = element_spec = None

    def __init__(self, run):
        self.run = run
        self.state = run.state

    def get_tf_dataset(self):
        """Return this object, over which Keras iterates; `Dataset.from_generator` would be slower."""
        return self

    def _tensors(self, batch):
        """Return a Batch as tensors and remember its size for the step."""
        state = self.state
        state.mean_count = batch.samples_per_worker * state.workers.size / state.num_replicas
        tensors = [tf.convert_to_tensor(batch.images), tf.convert_to_tensor(batch.labels)]
        if state.has_weights:
            tensors.append(tf.convert_to_tensor(batch.weights))
        return tuple(tensors)

    def _shard(self, tensors):
        """Return this worker's part of a batch of a Stream and remember its size for the step."""
        workers = self.state.workers
        count = tf.nest.flatten(tensors)[0].shape[0]
        self.state.batch_size = count
        self.state.mean_count = count / self.state.num_replicas
        if self.state.has_weights and len(tensors) == 2:
            tensors = (*tensors, tf.ones(count))
        if workers.size == 1:
            return tensors
        return tf.nest.map_structure(lambda tensor: tensor[workers.shard(count)], tensors)


class TrainingBatches(Batches):
    """The remaining batches of the running epoch.

    Args:
        run: the Run.
        augment: a function (images, labels, rng) that returns a changed batch; used with `--augment`.
    """

    def __init__(self, run, augment=None):
        super().__init__(run)
        self.augment = augment

    @property
    def num_batches(self):
        """The number of steps in an epoch."""
        return self.state.steps_per_epoch

    def __iter__(self):
        progress, train = self.run.progress, self.run.data.train
        if isinstance(train, Stream):
            self.run.start_epoch(self.state.steps_per_epoch)
            for tensors in train.batches(progress.epoch, progress.step):
                yield self._shard(tensors)
        else:
            for batch in self.run.training_batches(progress.epoch, self.augment):
                yield self._tensors(batch)


class ValidationBatches(Batches):
    """The batches of all validation samples."""

    @property
    def num_batches(self):
        """The number of steps in a validation."""
        return num_batches(self.state.args, self.run.data.validation)

    def __iter__(self):
        validation = self.run.data.validation
        if isinstance(validation, Stream):
            for tensors in validation.batches():
                yield self._shard(tensors)
        else:
            for batch in self.run.validation_batches():
                yield self._tensors(batch)


class Stream:
    """A data set that is a tf.data.Dataset of batches, or a function (epoch, first_step) that returns one."""

    unit = "batches"

    def __init__(self, source):
        self.source = source
        self.classes = getattr(source, "classes", None)
        dataset = self._open()
        self.element_spec = dataset.element_spec
        count = int(dataset.cardinality())
        if count == tf.data.INFINITE_CARDINALITY:
            raise UserError("a tf.data.Dataset in load_data is infinite: expected the batches of one epoch")
        if count == tf.data.UNKNOWN_CARDINALITY:
            log("Counting the batches of a tf.data.Dataset, as its cardinality() is unknown")
            count = sum(1 for _ in dataset)
        self._count = count

    def __len__(self):
        return self._count

    def __getitems__(self, indices):
        """Return arrays of the first samples: one for a single index, otherwise enough for statistics."""
        wanted = datasets.STATISTICS_SAMPLES if len(indices) > 1 else 1
        parts, count = [], 0
        for tensors in self._open():
            parts.append([np.asarray(tensor) for tensor in tensors])
            count += len(parts[-1][0])
            if count >= wanted:
                break
        return tuple(np.concatenate(arrays)[:wanted] for arrays in zip(*parts))

    def fingerprint(self):
        """Return the checksums of some samples and labels."""
        samples, labels = self.__getitems__(np.arange(2))[:2]
        count = datasets.FINGERPRINT_SAMPLES
        return {
            "checksum of some samples": zlib.crc32(np.ascontiguousarray(samples[:count])),
            "checksum of some labels": zlib.crc32(np.ascontiguousarray(labels[:count])),
        }

    def batches(self, epoch=0, first_step=0):
        """Yield the batches of an epoch, starting at a step. Raises UserError if batches are missing."""
        step = first_step
        for tensors in self._open(epoch, first_step):
            yield tensors
            step += 1
        if step < self._count:
            raise UserError(
                f"the tf.data.Dataset for epoch {epoch} and first step {first_step} has {step - first_step} "
                f"batches: expected {self._count - first_step}, as epoch 0 has {self._count}"
            )

    def take(self, count):
        """Return the first batches as a Stream."""
        return Stream(lambda epoch=0, first_step=0: self._open(epoch, first_step).take(count - first_step))

    def check_order(self):
        """Log a warning if the dataset from the second step on does not begin with the second batch."""
        batches = list(itertools.islice(self.batches(), 2))
        batches_again = list(itertools.islice(self.batches(), 2))
        rest = list(itertools.islice(self.batches(first_step=1), 1)) if self._count > 1 else []
        if not self_check.is_same(*map(tf.nest.flatten, (batches, batches_again))):
            return  # a later check warns about that
        if not self_check.is_same(*map(tf.nest.flatten, (batches[1:], rest))):
            log(
                "Warning: the tf.data.Dataset for epoch 0 and first step 1 does not begin with the second "
                "batch of that for first step 0: after an interruption the result will not be bit-identical. "
                "Skip `first_step` batches, and let order and random numbers follow from the epoch"
            )

    def _open(self, epoch=0, first_step=0):
        if not callable(self.source):
            return self.source.skip(first_step)
        try:
            return self.source(epoch, first_step)
        except RuntimeError as error:
            if "seed" not in str(error):
                raise
            raise UserError(
                "the tf.data.Dataset draws random numbers without a seed: let them follow from the epoch, as "
                f"the docstring of load_data says ({errors.first_line(error)})"
            ) from error


class Reseeding:
    """A data set that draws random numbers of `tf.random`, which are seeded here for each sample.

    Seeding takes some milliseconds, because TensorFlow drops its kernels. Other data sets are not seeded.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        tf.random.set_seed(
            random.getrandbits(32)
        )  # Python's own random numbers have been seeded for this sample
        return self.dataset[index]

    def __getattr__(self, name):
        if name == "__getitems__":
            raise AttributeError(name)  # each sample has its own seed
        return getattr(self.dataset, name)


def wrap_data_sets(train, validation):
    """Return both data sets in a form that `common/` accepts."""
    wrapped = _wrap(train), _wrap(validation)
    if isinstance(wrapped[0], Stream):
        wrapped[0].check_order()
    if any(isinstance(dataset, Reseeding) for dataset in wrapped):
        log("A data set uses tf.random, which is slow to seed for each sample: numpy.random is faster")
    return wrapped


def _wrap(dataset):
    if isinstance(dataset, datasets.ArrayDataset):
        return dataset
    if isinstance(dataset, tf.data.Dataset) or not hasattr(dataset, "__getitem__"):
        return Stream(dataset)
    if _draws_from_tensorflow(dataset):
        return Reseeding(dataset)
    return dataset


def _draws_from_tensorflow(dataset):
    """Return whether reading some samples changes the next random number of `tf.random`."""
    random.seed(0)
    np.random.seed(0)
    tf.random.set_seed(0)
    undisturbed = float(tf.random.uniform([]))
    tf.random.set_seed(0)
    for index in range(min(4, len(dataset))):
        dataset[index]
    return float(tf.random.uniform([])) != undisturbed


def num_batches(args, dataset):
    """Return the number of batches in a data set."""
    if isinstance(dataset, Stream):
        return len(dataset)
    return len(batches.batch_sizes(len(dataset), args.batch_size))


def seed_sample(seed):
    """Do nothing: see Reseeding."""


def to_array(sample):
    """Return a sample as a NumPy array."""
    return np.asarray(sample)


def to_device(value):
    """Return a number or a list as it is."""
    return value


# Checkpoints ------------------------------------------------------------------------------------------------
# A .keras file for keras.models.load_model. Additional members, which Keras ignores, hold the rest.

WEIGHTS = "model.weights.h5"
FACTS = "training/state.json"
ARRAY = "training/{}.npy"


class Archive:
    """The content of a model's .keras file, except for the values of the variables.

    Keras cannot save the values of an earlier step, which a checkpoint in the background needs.

    Args:
        model: built and compiled. Its variables change temporarily.

    Attributes:
        members: the contents of the archive's other files by name; empty if Keras cannot save the model.
        groups: the attributes of the groups in the file `model.weights.h5`, by name.
        names: the names of the variables in that file, by their keys such as "model/3".
    """

    def __init__(self, model):
        self.names = {}
        self.members = {}
        self.groups = {}
        variables = {}
        for key, group in (("model", model.variables), ("optimizer", model.optimizer.variables)):
            variables.update((f"{key}/{index}", variable) for index, variable in enumerate(group))
        values = [variable.numpy() for variable in variables.values()]
        try:
            for number, variable in enumerate(variables.values()):
                variable.assign(np.full(variable.shape, number, variable.dtype))  # to find it in the file
            self._save(model, variables)
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            log(f"Warning: Keras cannot open the checkpoints, as it cannot save this model: {reason}")
            self.names = {}
            self.members = {}
        finally:
            for variable, value in zip(variables.values(), values):
                variable.assign(value)
        if self.members:  # Keras has computed its learning rate from the temporary values
            config = json.loads(self.members["config.json"])
            config["compile_config"] = model.get_compile_config()
            self.members["config.json"] = json.dumps(config)

    def _save(self, model, variables):
        """Save the model with Keras, its variables numbered in this order, and keep the written content."""
        keys = list(variables)
        buffer = io.BytesIO()  # model.save() needs a file, and the disk may be full
        saving_lib._save_model_to_fileobj(model, buffer, "h5")
        with zipfile.ZipFile(buffer) as archive:
            for name in archive.namelist():
                if name != WEIGHTS:
                    self.members[name] = archive.read(name)
            with archive.open(WEIGHTS) as file, h5py.File(file) as weights:
                for name, item in _hdf5_items(weights).items():
                    if not isinstance(item, h5py.Dataset):
                        self.groups[name] = dict(item.attrs)
                        continue
                    key = keys[int(item[(0,) * item.ndim])]
                    if item.shape != tuple(variables[key].shape):
                        raise ValueError(f"{name} is not a variable of it")
                    self.names[key] = name


def _hdf5_items(file):
    """Return groups and arrays of an HDF5 file by name, except those stored in other files."""
    names = []
    file.visit(names.append)  # follows no links to other files
    items = {name: file[name] for name in names}
    return {
        name: item
        for name, item in items.items()
        if not isinstance(item, h5py.Dataset) or not (item.external or item.is_virtual)
    }


def copy_to_host(content, memory):
    """Return (arrays by name, everything else, Archive): a list of arrays as `key/0`, `key/1` and so on.

    The arrays are tensors that are not copied yet: TensorFlow copies them when a step changes them.
    """
    arrays, facts = {}, {}
    for key, value in content.items():
        if isinstance(value, list) and value and hasattr(value[0], "shape"):
            for index, array in enumerate(value):
                arrays[f"{key}/{index}"] = tf.convert_to_tensor(array)
        else:
            facts[key] = value
    return arrays, facts, memory.get("archive")


def write_checkpoint(content, file):
    """Write what `copy_to_host` has returned."""
    arrays, facts, archive = content
    facts = {**facts, "names": archive.names}
    with zipfile.ZipFile(file, "w") as container:
        for name, text in archive.members.items():
            container.writestr(zipfile.ZipInfo(name), text)
        if archive.names:
            buffer = io.BytesIO()
            with h5py.File(buffer, "w") as weights:
                for name, attributes in archive.groups.items():
                    weights.create_group(name).attrs.update(attributes)
                for key, name in archive.names.items():
                    weights[name] = np.asarray(arrays[key])
            buffer.seek(0)
            with container.open(zipfile.ZipInfo(WEIGHTS), "w", force_zip64=True) as member:
                shutil.copyfileobj(buffer, member, 2**20)
        container.writestr(zipfile.ZipInfo(FACTS), json.dumps(facts, default=_to_plain))
        for key, array in arrays.items():
            if key in archive.names:
                continue
            array = np.asarray(array, order="C")
            with container.open(ARRAY.format(key), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(array))
                member.write(array.reshape(-1).view(np.uint8))


def _to_plain(value):
    """Convert NumPy numbers and arrays in the state of a callback to Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    kind = type(value).__name__
    raise UserError(f"the state_dict() of a callback contains a {kind}: expected plain values or arrays")


def read_checkpoint(file):
    """Return what `write_checkpoint` has written; nothing in the file is executed."""
    atomic_io.check_zip(file)
    arrays = {}
    with zipfile.ZipFile(file) as container:
        content = json.loads(container.read(FACTS))
        if not isinstance(content, dict) or not isinstance(content.get("progress"), dict):
            raise ValueError("it is not a checkpoint of this script")
        names = content.pop("names")
        if names:
            with container.open(WEIGHTS) as member, h5py.File(member) as weights:
                found = []
                weights.visit(found.append)  # follows no links to other files
                for key, name in names.items():
                    item = weights[name]
                    if name not in found or item.external or item.is_virtual:
                        raise ValueError("its weights are in other files")
                    arrays[key] = item[()]
        prefix, suffix = ARRAY.split("{}")
        for name in container.namelist():
            if name.startswith(prefix) and name.endswith(suffix):
                with container.open(name) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
                arrays[name[len(prefix) : -len(suffix)]] = array
    for key in {key.rpartition("/")[0] for key in arrays}:
        indices = range(sum(name.rpartition("/")[0] == key for name in arrays))
        content[key] = [arrays[f"{key}/{index}"] for index in indices]
    return content


def describe_machine(args):
    """Return the facts that change the bits of the result, but not its quality."""
    wanted = tf.config.threading.get_intra_op_parallelism_threads() or os.environ.get(
        "TF_NUM_INTRAOP_THREADS"
    )
    wanted = str(wanted or os.environ.get("OMP_NUM_THREADS"))
    threads = int(wanted) if wanted.isdigit() and int(wanted) else machine.num_cores()
    return {"CPU threads": threads, FRAMEWORK: VERSION}
