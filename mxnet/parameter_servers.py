"""Sums of gradients over all workers by MXNet's own engine, its parameter servers, with the same bits in each run.

Gluon's Trainer does the same, but over several workers it is wrong now and then: it does not wait for the first weights
before it sends gradients, which then come in their place. Here only sums are sent back, never weights.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading

import mxnet as mx
import numpy as np

from common import cluster, errors

_store = None  # the connection to the servers
_pairs = []  # for each parameter an array (pairs of workers, *shape)

# What a process serves as, MXNet decides by a variable while it is imported. The process ends when nobody holds the
# other end of its standard input any more: it never outlives its worker, however that ends.
_SERVER = """
import sys
sys.path[:] = {!r}
import os, threading
threading.Thread(target=lambda: os._exit(len(os.read(0, 1))), daemon=True).start()
import numpy
numpy.bool = bool
import mxnet
"""


def start():
    """Start a server on each worker, and a scheduler on the leader; nothing where this worker is alone."""
    global _store
    if cluster.size == 1:
        return
    with socket.create_server((cluster.address, 0)) as free:
        port = cluster.gather(free.getsockname()[1])[0]
    addresses = {"DMLC_PS_ROOT_URI": cluster.leader_address, "DMLC_NODE_HOST": cluster.address}
    numbers = {"DMLC_PS_ROOT_PORT": port, "DMLC_NUM_WORKER": cluster.size, "DMLC_NUM_SERVER": cluster.size}
    os.environ.update(addresses, DMLC_ROLE="worker", **{name: str(number) for name, number in numbers.items()})
    for role in ["scheduler", "server"] if cluster.leads() else ["server"]:
        _start_process(role)
    _store = mx.kv.create("dist_sync")  # waits for all of them
    # At the end nobody waits for the others, who may be gone: the servers end with their workers.
    mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(_store.handle, 0))
    atexit.register(_stop)  # before MXNet itself is taken down


def broadcast(parameters):
    """Give each of Gluon's `parameters` the leader's values, and on each device the same, the mean of all devices."""
    if cluster.size == 1 and all(len(parameter.list_ctx()) == 1 for parameter in parameters.values()):
        return
    for parameter in parameters.values():
        values = cluster.broadcast(parameter._reduce().asnumpy().tobytes())
        parameter.set_data(mx.nd.array(np.frombuffer(values, parameter.dtype).reshape(parameter.shape)))


def add_up(gradients):
    """Replace each gradient by the sum over all workers; nothing where this worker is alone.

    A server adds in the order of arrival. Of two terms the sum has the same bits in either order, of more it has not.
    So the servers add up pairs of workers, and each worker the pairs: for n workers n/2 times the bytes of a plain sum.

    Args:
        gradients: a list for each parameter with its gradient, once for each device of this worker.
    """
    if cluster.size == 1:
        return
    if not _pairs:
        _pairs.extend(mx.nd.zeros(((cluster.size + 1) // 2, *copies[0].shape)) for copies in gradients)
        _store.init(list(range(len(_pairs))), [array.copy() for array in _pairs])  # MXNet writes to what it gets here
    for key, (copies, pairs) in enumerate(zip(gradients, _pairs)):
        # The engine orders what is done with one array: so each push waits for the pull of the step before, without
        # which a server would count this worker twice. A new array in each step would wait for nothing.
        pairs[:] = 0
        copies[0].copyto(pairs[cluster.rank // 2])
        _store.pushpull(key, pairs, priority=-key)
        total = pairs[0]
        for pair in range(1, len(pairs)):
            total = total + pairs[pair]
        for copy in copies:
            total.copyto(copy)


def _stop():
    global _store
    _store = None


def _start_process(role):
    """Start a scheduler or a server in a process of its own; its early end is the end of this worker.

    SIGTERM and Ctrl-C do not reach it, whoever else gets them: it is needed until the training state is saved.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    command = [sys.executable, "-c", _SERVER.format(sys.path)]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the new process inherits that
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "DMLC_ROLE": role})  # noqa: S603
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    threading.Thread(target=_watch, args=(role, process), daemon=True).start()


def _watch(role, process):
    reason = f"MXNet's {role} has ended with exit code {process.wait()}: see the log"
    try:
        cluster.fail(reason)
        errors.fail(reason)
    finally:
        os._exit(1)  # the main thread may be waiting for it for ever
