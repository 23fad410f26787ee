"""The workers that train one model: rank, main process, barriers, broadcast, and failing together.

The frameworks' own engines sum the gradients. This module does the rest for all four scripts: over TCP
connections to the main process the workers meet, agree to stop at the same step, receive the main process's
checkpoint, add up metrics, and fail together, even if an engine would wait for ever. With one worker every
method is a no-op.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from argparse import Namespace
from typing import Any, Sequence

from common.errors import UserError, read_count, say, write_failure_reason

PORT = 29400  # where the workers meet, at the address of the main process
RUN_AGAIN = "To resume, run the same command on all hosts again"
SILENCE = 30  # seconds without an answer after which a machine counts as lost
MIN_PATIENCE = 2  # seconds for the first message of the last worker that joins
MAX_HELLO = 1 << 16  # bytes of a message before both sides know each other
MAX_STRANGERS = 100  # connections that may wait at the port

# Flags that may differ between the workers.
PER_WORKER_FLAGS = {
    "--device",
    "--num-gpus",
    "--train",
    "--validation",
    "--weights",
    "--output",
    "--checkpoint-path",
    "--model-dir",
    "--output-data-dir",
    "--hosts",
    "--current-host",
    "--join-seconds",
    "--loaders",
    "--log-steps",
}

_HEADER = struct.Struct(">cQ")  # kind and length of a message
_VALUE, _BYE, _END = b"V", b"B", b"E"


def flag_values(args: Namespace) -> dict[str, str]:
    """Return the flags as a dictionary such as {"--batch-size": "64"}."""
    return {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()}


class Workers:
    """All workers of a training, as seen by one of them; rank 0 is the main process.

    Attributes:
        rank: the number of this worker.
        size: the number of workers, or world size.
        names: the names of all workers, by rank.
        is_main_process: whether this worker writes the log, the checkpoints, the model and the metrics.
        address, main_address: the IP addresses of this worker and of the main process, as they see each
            other.
    """

    def __init__(self, rank: int = 0, names: Sequence[str] = ("localhost",)) -> None:
        self.rank = rank
        self.names = list(names)
        self.size = len(self.names)
        self.is_main_process = rank == 0
        self.address = self.main_address = "127.0.0.1"
        # By rank: all other workers in the main process, only rank 0 in the others.
        self._peers: dict[int, Peer] = {}
        # Seconds that the main process waits for a message; None: for ever.
        self._patience: float | None = None
        # Held by the thread that ends this process: only the first reason is reported.
        self._ending = threading.Lock()

    def shard(self, count: int) -> slice:
        """Return the slice of this worker if `count` items are split as evenly as possible."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def describe_shards(self, count: int, items: str) -> str:
        """Describe the workers and their shards of `count` items for the log; "" with one worker."""
        if self.size == 1:
            return ""
        shards = sorted({count // self.size, -(-count // self.size)})
        sizes = " or ".join(map(str, shards))
        return f", {self.size} workers: {', '.join(self.names)}; each gets {sizes} of the {count} {items}"

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all workers, by rank. Every worker must make this call.

        A value is anything that JSON can represent; floats keep their bits.
        """
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        if self.is_main_process:
            received = [self._next_message(rank) for rank in range(1, self.size)]
            content = b"[%s]" % b",".join([content, *received])
            self._send_all(_VALUE, content)
        else:
            self._peers[0].send(_VALUE, content)
            content = self._peers[0].inbox.get()
        return json.loads(content)

    def _next_message(self, rank):
        try:
            return self._peers[rank].inbox.get(timeout=self._patience)
        except queue.Empty as error:
            raise UserError(
                f"{self.names[rank]} joined, but then sent nothing: see its log, or raise --join-seconds"
            ) from error

    def broadcast(self, content: bytes = b"") -> bytes:
        """Return the bytes of the main process on every worker; the argument of the others is ignored."""
        if self.size == 1:
            return content
        if not self.is_main_process:
            return self._peers[0].inbox.get()
        self._send_all(_VALUE, content)
        return content

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError if the dictionary `facts` differs from that of the main process."""
        expected = self.all_gather(facts)[0]
        for name in expected:
            if facts.get(name) != expected[name]:
                raise UserError(
                    f"{name} is {facts.get(name)!s:.100} on this worker, but {expected[name]!s:.100} on "
                    f"{self.names[0]}, the main process: all workers need the same flags, "
                    "the same kind of device, and all of the data (FullyReplicated)"
                )

    def leave(self) -> None:
        """Wait until every worker has finished, so that a late failure still reaches all of them."""
        if self.size == 1:
            return
        if not self.is_main_process:
            self._send_all(_BYE, b"")
        for peer in self._peers.values():
            peer.inbox.get()
        if self.is_main_process:
            self._send_all(_BYE, b"")

    def fail(self, reason: str) -> None:
        """Send the other workers the reason why this one ends, so that they end too.

        The call does not return if another thread is already ending this process.
        """
        if self._peers:
            if not self._ending.acquire(blocking=False):
                threading.Event().wait()  # until the other thread ends this process
            self._send_end(1, f"error: {self.names[self.rank]} has failed: {reason}. {RUN_AGAIN}")

    def stop(self, code: int, reason: str) -> None:
        """End all workers with the same exit code, after a signal before the training.

        A thread does it: the signal may have interrupted a message that the main thread has to finish first.
        """

        def end():
            if self._ending.acquire(blocking=False):
                self._send_end(code, reason)
            os._exit(code)

        threading.Thread(target=end, daemon=True).start()

    def end_if_another_failed(self) -> None:
        """Wait, as the failure of another worker may have caused an error: its message ends this process."""
        if self._peers:
            time.sleep(3)

    def connect(self, main_host: str, port: int, seconds: float, local: bool) -> None:
        """Connect all workers with the main process. Raises UserError with the names of missing workers."""
        deadline = time.monotonic() + seconds
        if self.is_main_process:
            # Workers on one machine expose the port to no other machine.
            host = socket.gethostbyname(main_host) if local else ""
            self._wait_for_workers(host, port, seconds, deadline)
        else:
            self._find_main_process(main_host, port, seconds, deadline)
        connection = next(iter(self._peers.values())).socket
        self.address = connection.getsockname()[0]
        self.main_address = self.address if self.is_main_process else connection.getpeername()[0]

    def _wait_for_workers(self, host, port, seconds, deadline):
        """Accept all workers; other connections to the port cannot delay the deadline."""
        hellos = {}  # the bytes received from each connection that is not accepted yet, the oldest first
        with _listen(host, port, deadline) as server:
            server.setblocking(False)
            while missing := [rank for rank in range(1, self.size) if rank not in self._peers]:
                wait = max(0, deadline - time.monotonic())
                ready, _, _ = select.select([server, *hellos], [], [], wait)
                if time.monotonic() > deadline:
                    absent = ", ".join(self.names[rank] for rank in missing)
                    raise UserError(
                        f"waited {seconds:g} seconds for {absent}: "
                        f"only {len(self._peers) + 1} of {self.size} workers have joined. "
                        "See their logs, or raise --join-seconds"
                    )
                for connection in ready:
                    if connection is not server:
                        self._read_hello(connection, hellos)
                        continue
                    with contextlib.suppress(OSError):  # it may be gone already
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        hellos[connection] = b""
                for connection in list(hellos)[:-MAX_STRANGERS]:
                    del hellos[connection]
                    connection.close()
        for connection in hellos:
            connection.close()
        self._patience = max(MIN_PATIENCE, deadline - time.monotonic())

    def _read_hello(self, connection, hellos):
        """Read from a connection. Accept a complete hello of a missing worker; close others."""
        content = hellos.pop(connection)
        try:
            received = connection.recv(MAX_HELLO)
            content += received
            length = int.from_bytes(content[1 : _HEADER.size].ljust(_HEADER.size - 1, b"\0"), "big")
            if received and len(content) < _HEADER.size + length < MAX_HELLO:
                hellos[connection] = content
                return
            hello = json.loads(content[_HEADER.size :])
            missing = [rank for rank in range(1, self.size) if rank not in self._peers]
            if hello["names"] == self.names and hello["rank"] in missing:
                peer = self._peers[hello["rank"]] = Peer(self, hello["rank"], connection)
                peer.send(_VALUE, b"")
                return
            waiting = ", ".join(self.names[rank] for rank in missing)
            reason = f"error: {self.names[0]} waits for {waiting} of {', '.join(self.names)}"
            content = json.dumps([1, reason]).encode()
            connection.sendall(_HEADER.pack(_END, len(content)) + content)
        except Exception:  # noqa: S110 - no message from another program may end the training
            pass
        connection.close()

    def _find_main_process(self, host, port, seconds, deadline):
        """Connect to the main process, which may start later; until then another program may use its port."""
        hello = json.dumps({"rank": self.rank, "names": self.names}).encode()
        while True:
            connection = None
            try:
                connection = socket.create_connection((host, port), max(0.1, deadline - time.monotonic()))
                # TCP can connect to itself by chance.
                if connection.getsockname() == connection.getpeername():
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                connection.sendall(_HEADER.pack(_VALUE, len(hello)) + hello)
                kind, length = _HEADER.unpack(_receive(connection, _HEADER.size, deadline))
                if kind not in (_VALUE, _END) or length > MAX_HELLO:
                    raise ValueError("another program answers")
                answer = _receive(connection, length, deadline)
                if kind == _END:
                    code, reason = json.loads(answer)
                    self.end(code, reason)
                self._peers[0] = Peer(self, 0, connection)
                return
            except (OSError, EOFError, ValueError, TypeError, RecursionError) as error:
                if connection:
                    connection.close()
                if time.monotonic() > deadline:
                    reason = getattr(error, "strerror", None) or str(error) or "no answer"
                    raise UserError(
                        f"waited {seconds:g} seconds for {self.names[0]}, "
                        f"the main process of {self.size} workers, at {host} port {port}: {reason}. "
                        "See its log, or raise --join-seconds"
                    ) from error
                time.sleep(0.2)

    def _send_all(self, kind, content):
        for peer in list(self._peers.values()):
            peer.send(kind, content)

    def _send_end(self, code, message):
        content = json.dumps([code, message]).encode()
        for peer in list(self._peers.values()):
            peer.send(_END, content, patience=1)  # without it a worker sees a closed connection

    def end(self, code: int, message: str) -> None:
        """End this process and the other workers, no matter what the main thread is waiting for."""
        if self._ending.acquire(blocking=False):
            try:
                self._send_end(code, message)
                write_failure_reason(message)
                say(message, sys.stderr)
            finally:
                os._exit(code)


# A machine that fails closes no connection: probe it every few seconds.
_TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": SILENCE // 3,
    "TCP_KEEPINTVL": SILENCE // 6,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": SILENCE * 1000,
}


class Peer:
    """A connection to another worker, with a thread that reads from it and detects a lost worker."""

    def __init__(self, workers: Workers, rank: int, connection: socket.socket) -> None:
        self.workers = workers
        self.name = workers.names[rank]
        self.socket = connection
        self.inbox: queue.Queue[bytes] = queue.Queue()
        self.lock = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):  # macOS lacks some of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._read_all, daemon=True).start()

    def send(self, kind: bytes, content: bytes, patience: float = -1) -> None:
        """Send a message, unless another one is still being sent after `patience` seconds.

        If the other worker is gone, the thread that reads from it ends this process with the reason.
        """
        if self.lock.acquire(timeout=patience):
            with contextlib.suppress(OSError):
                self.socket.sendall(_HEADER.pack(kind, len(content)))
                self.socket.sendall(content)
            self.lock.release()

    def _read_all(self):
        try:
            kind = None
            while kind != _BYE:
                kind, length = _HEADER.unpack(_receive(self.socket, _HEADER.size))
                content = _receive(self.socket, length)
                if kind == _END:
                    self.workers.end(*json.loads(content))
                self.inbox.put(content)
        except BaseException as error:  # if the thread ended silently, this process would wait for ever
            time.sleep(
                1
            )  # a signal that ended the other worker may reach this one too: then it is the reason
            happened = f"sent a message that cannot be read: {error!r}"
            if isinstance(error, (OSError, EOFError)):
                cause = f" ({error.strerror or error})" if isinstance(error, OSError) else ""
                happened = f"closed the connection without a reason{cause}: see its log"
            self.workers.end(1, f"error: {self.name} {happened}. {RUN_AGAIN}")


def join(args: Namespace) -> Workers:
    """Return the Workers, all connected; from now on they fail together.

    The workers are the processes that torchrun has started, or else one on each of `--hosts`, ranked by
    name. Raises UserError if a worker is missing after `--join-seconds` or has different flags.
    """
    env = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):  # set by torchrun
        names = [f"rank {rank}" for rank in range(read_count("WORLD_SIZE", 1))]
        rank = read_count("RANK", 0)
        if rank >= len(names):
            raise UserError(f"the variable RANK is {rank}: expected less than WORLD_SIZE, {len(names)}")
        workers = Workers(rank, names)
        local = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
        main_host = "127.0.0.1" if local else env["MASTER_ADDR"]
        port = args.port or read_count("MASTER_PORT", PORT - 1) + 1
    else:
        names = sorted(args.hosts)
        if len(set(names)) < len(names) or args.current_host not in names:
            raise UserError(
                f"--current-host {args.current_host}: expected one of --hosts, "
                f"which are {', '.join(names)}, each once"
            )
        workers = Workers(names.index(args.current_host), names)
        main_host = names[0]
        port = args.port or PORT
        local = workers.size > 1 and all(_is_loopback(name) for name in names)
    if workers.size > 1:
        shared = {flag: value for flag, value in flag_values(args).items() if flag not in PER_WORKER_FLAGS}
        try:
            workers.connect(main_host, port, args.join_seconds, local)
            workers.check_same(shared)  # also a barrier: no worker starts before all have joined
            workers._patience = None
        except UserError as error:
            workers.fail(str(error))
            raise
        if not workers.is_main_process:
            say(f"Worker {workers.rank + 1} of {workers.size} started; see the log of {names[0]}")
    return workers


def _is_loopback(host):
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _listen(host, port, deadline):
    """Return the listening socket of the main process."""
    while True:
        try:
            return socket.create_server((host, port))
        except OSError as error:
            # An earlier run that is ending may still use the port.
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise UserError(
                    f"the workers cannot meet at port {port}: {error.strerror}. "
                    "Pass another --port to all of them"
                ) from error
            time.sleep(0.2)


def _receive(connection, length, deadline=None):
    """Return `length` bytes from a connection. Raises EOFError if it ends early, OSError at the deadline."""
    content = bytearray(length)
    view = memoryview(content)
    while len(view):
        if deadline:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(content)
