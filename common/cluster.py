"""Several workers that train one model: who takes part, who leads, and what they tell each other beside the gradients.

The gradients are the business of the frameworks' own engines. The rest is here, the same for all four scripts: over TCP
connections to the leader the workers meet, agree to stop at the same step, get the leader's checkpoint, add up metrics,
and end together when one of them fails, also where an engine would wait for ever. For whoever trains alone each
function returns at once.
"""

import contextlib
import errno
import json
import os
import queue
import socket
import struct
import sys
import threading
import time

from common.errors import UserError, tell_sagemaker

PORT = 29400  # where the workers meet, at the leader's address
AGAIN = "To resume, run the same command on all hosts again"
SILENCE = 30  # seconds without an answer after which a machine counts as gone

# Flags that may differ between the workers.
OWN = {
    "--device",
    "--num-gpus",
    "--train",
    "--validation",
    "--checkpoint-path",
    "--model-dir",
    "--output-data-dir",
    "--hosts",
    "--current-host",
    "--join-seconds",
    "--workers",
    "--log-steps",
}

rank = 0  # of this worker; rank 0 leads
size = 1  # number of workers: the world size
names = ["localhost"]  # of all workers, by rank
address = leader_address = "127.0.0.1"  # of this worker and of the leader, as they see each other

_peers = {}  # by rank: the leader has all others here, they only the leader
_ending = threading.Lock()  # held by the thread that ends this process, so that one reason is told, the first

_HEADER = struct.Struct(">cQ")  # kind and length of a message
_VALUE, _BYE, _END = b"V", b"B", b"E"


def join(args):
    """Find out which worker this is, and wait for all others; from then on the end of one is the end of all.

    The workers are those that torchrun has started, otherwise one on each of `--hosts`, ranked by their sorted names.
    Raises UserError where someone is missing after `--join-seconds`, naming who, or has other flags.
    """
    global rank, size, names, address, leader_address
    rank, names, leader, port, local = _role(args)
    if len(names) == 1:
        return
    deadline = time.monotonic() + args.join_seconds
    if rank == 0:
        # On one machine alone nobody else needs to see the port.
        _wait_for_workers(socket.gethostbyname(leader) if local else "", port, args.join_seconds, deadline)
    else:
        _find_leader(leader, port, args.join_seconds, deadline)
    connection = next(iter(_peers.values())).socket
    address = connection.getsockname()[0]
    leader_address = address if rank == 0 else connection.getpeername()[0]
    size = len(names)
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()}
    check_same({flag: value for flag, value in given.items() if flag not in OWN})  # nobody begins before all are there
    if not leads():
        print(f"Worker {rank + 1} of {size}, led by {names[0]}: the log is there", flush=True)


def leads():
    """Return whether this worker is the one that writes log, checkpoints, model and metrics."""
    return rank == 0


def describe(count, what):
    """Return how the log tells of the workers, and of their shares of `count` things; nothing for whoever is alone."""
    if size == 1:
        return ""
    shares = sorted({count // size, -(-count // size)})
    return f", {size} workers: {', '.join(names)}; each gets {' or '.join(map(str, shares))} of the {count} {what}"


def share(count):
    """Return the slice of this worker when `count` things are split as evenly as possible."""
    return slice(count * rank // size, count * (rank + 1) // size)


def gather(value):
    """Return the values of all workers, by rank, to each of them: all have to call this equally often.

    A value is what JSON can hold; floats keep their bits.
    """
    if size == 1:
        return [value]
    content = json.dumps(value).encode()
    if leads():
        content = b"[%s]" % b",".join([content, *(_peers[other].inbox.get() for other in range(1, size))])
        _send_all(_VALUE, content)
    else:
        _peers[0].send(_VALUE, content)
        content = _peers[0].inbox.get()
    return json.loads(content)


def total(numbers):
    """Return the sums of a list of numbers over all workers, added by rank: everyone gets the same bits."""
    return [sum(column) for column in zip(*gather(numbers))]


def broadcast(content=b""):
    """Return the leader's bytes to each worker, whatever the others pass."""
    if size == 1:
        return content
    if not leads():
        return _peers[0].inbox.get()
    _send_all(_VALUE, content)
    return content


def check_same(facts):
    """Raise UserError where a dictionary of facts is not that of the leader."""
    leaders = gather(facts)[0]
    for name in leaders:
        if facts.get(name) != leaders[name]:
            raise UserError(
                f"{name} is {facts.get(name)!s:.100} here, but {leaders[name]!s:.100} on {names[0]}, which leads: "
                "all workers need the same flags, the same kind of device, and all of the data (FullyReplicated)"
            )


def leave():
    """Wait until everyone is done, so that whoever fails at the very end still fails all."""
    if size == 1:
        return
    if not leads():
        _send_all(_BYE, b"")
    for peer in _peers.values():
        peer.inbox.get()
    if leads():
        _send_all(_BYE, b"")


def fail(reason):
    """Tell the others why this worker ends, so that they end too; it does not return where that has begun already."""
    if _peers:
        if not _ending.acquire(blocking=False):
            threading.Event().wait()  # for the thread that ends this process
        _send_end(1, f"error: {names[rank]} has failed: {reason}. {AGAIN}")


def stop(code, reason):
    """End this worker, which got a signal before the training, and all others, with the same exit code.

    In a thread: the signal may have come in the middle of a message, which the main thread has to finish first.
    """

    def end():
        if _ending.acquire(blocking=False):
            _send_end(code, reason)
        os._exit(code)

    if not _peers:
        os._exit(code)
    threading.Thread(target=end, daemon=True).start()


def end_if_another_failed():
    """Where an error was caused by the end of another worker, end with the reason for that: it may be on its way."""
    if _peers:
        time.sleep(3)  # it ends this process when it arrives


def _role(args):
    """Return this worker's rank, the names of all, the leader's host and port, and whether all are on this machine."""
    env = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):  # what torchrun sets
        workers = [f"rank {number}" for number in range(int(env["WORLD_SIZE"]))]
        leader, local = env["MASTER_ADDR"], env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
        return int(env["RANK"]), workers, leader, args.port or int(env["MASTER_PORT"]) + 1, local
    hosts = sorted(args.hosts)
    if len(set(hosts)) < len(hosts) or args.current_host not in hosts:
        raise UserError(
            f"--current-host {args.current_host}: expected one of --hosts, which are {', '.join(hosts)}, each once"
        )
    local = len(hosts) > 1 and all(_is_loopback(host) for host in hosts)
    return hosts.index(args.current_host), hosts, hosts[0], args.port or PORT, local


def _is_loopback(host):
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _wait_for_workers(host, port, seconds, deadline):
    """Let all others connect to this worker, the leader, at an address of it or, where that is empty, at all."""
    with _listen(host, port, deadline) as server:
        while len(_peers) < len(names) - 1:
            missing = [number for number in range(1, len(names)) if number not in _peers]
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except (socket.timeout, BlockingIOError) as error:
                raise UserError(
                    f"waited {seconds:g} seconds for {', '.join(names[number] for number in missing)}: only "
                    f"{len(_peers) + 1} of {len(names)} workers are here. See their logs, or raise --join-seconds"
                ) from error
            _admit(connection, missing)


def _listen(host, port, deadline):
    """Return the leader's listening socket."""
    while True:
        try:
            return socket.create_server((host, port))
        except OSError as error:
            # The port may be that of an earlier run, which is ending.
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise UserError(
                    f"the workers cannot meet at port {port}: {error.strerror}. Pass another --port to all of them"
                ) from error
            time.sleep(0.2)


def _admit(connection, missing):
    """Take whoever has connected as one of the missing workers, or send him away."""
    try:
        connection.settimeout(2)
        _, length = _HEADER.unpack(_read(connection, _HEADER.size))
        hello = json.loads(_read(connection, min(length, 1 << 16)))
        if hello["names"] == names and hello["rank"] in missing:
            _peers[hello["rank"]] = _Peer(hello["rank"], connection)
            _peers[hello["rank"]].send(_VALUE, b"")
            return
        reason = f"error: {names[0]} waits for {', '.join(names[number] for number in missing)} of {', '.join(names)}"
        content = json.dumps([1, reason]).encode()
        connection.sendall(_HEADER.pack(_END, len(content)) + content)
    except Exception:  # noqa: S110 - whatever a stranger sends, it must not end the training
        pass
    connection.close()


def _find_leader(leader, port, seconds, deadline):
    """Connect to the leader, who may start later."""
    while True:
        try:
            connection = socket.create_connection((leader, port), max(0.1, deadline - time.monotonic()))
            if connection.getsockname() == connection.getpeername():  # so TCP does now and then where nobody listens
                connection.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            _peers[0] = _Peer(0, connection)
            _peers[0].send(_VALUE, json.dumps({"rank": rank, "names": names}).encode())
            _peers[0].inbox.get(timeout=max(0.1, deadline - time.monotonic()))
            return
        except (OSError, queue.Empty) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"waited {seconds:g} seconds for {names[0]}, which leads the {len(names)} workers, at {leader} "
                    f"port {port}: {getattr(error, 'strerror', None) or 'no answer'}. See its log, or raise "
                    "--join-seconds"
                ) from error
            time.sleep(0.2)


class _Peer:
    """A connection to another worker; a thread reads from it all the time, and so notices when the other is gone."""

    def __init__(self, number, connection):
        self.name, self.socket = names[number], connection
        self.inbox, self.lock = queue.Queue(), threading.Lock()
        connection.settimeout(None)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            # A machine that vanishes closes no connection: ask it every few seconds.
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 3),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 6),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000),
        ):
            connection.setsockopt(level, option, value)
        threading.Thread(target=self._read_all, daemon=True).start()

    def send(self, kind, content, patience=-1):
        """Send a message, unless another is still being sent after `patience` seconds.

        Where the other is gone, the thread that reads from it knows why, and ends this process.
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
                kind, length = _HEADER.unpack(_read(self.socket, _HEADER.size))
                content = _read(self.socket, length)
                if kind == _END:
                    _end(*json.loads(content))
                self.inbox.put(content)
        except BaseException as error:  # a thread that ends in silence would leave this process waiting for ever
            time.sleep(1)  # a signal that has ended the other may reach this process too, and then it is the reason
            cause = f" ({error.strerror or error})" if isinstance(error, OSError) else ""
            known = isinstance(error, (OSError, EOFError))
            happened = f"has ended without a word{cause}: see its log" if known else f"cannot be understood: {error!r}"
            _end(1, f"error: {self.name} {happened}. {AGAIN}")


def _read(connection, length):
    """Return so many bytes from a connection; EOFError where it ends before."""
    content = bytearray(length)
    view = memoryview(content)
    while len(view):
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(content)


def _send_all(kind, content):
    for peer in list(_peers.values()):
        peer.send(kind, content)


def _send_end(code, message):
    content = json.dumps([code, message]).encode()
    for peer in list(_peers.values()):
        peer.send(_END, content, patience=1)  # whoever is not told sees the end of the connection


def _end(code, message):
    """End this process and the others, whatever its main thread is waiting for."""
    if _ending.acquire(blocking=False):
        try:
            _send_end(code, message)
            tell_sagemaker(message)
            print(message, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
