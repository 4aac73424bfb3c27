"""The keeper of a worker process: a small process between the node and the worker.

Solves that what user code starts ends with it. The keeper adopts every process below it, also one that
left its group and session or lost its parent, so that none can hide; it ends all of them when the
worker ends, when the node says so, and when the node is gone, however that went.

It imports nothing but the standard library, has one thread, and becomes the worker by a fork; so
nothing of the node, which has many threads, is ever forked.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# How often to look whether the node is there and which orphans ended.
_LOOK_SECONDS = 1.0
# How long a worker may take to end by itself once it is told to, and all others to be gone.
GRACE_SECONDS, _GONE_SECONDS = 2.0, 5.0
#: What the node sends: end at once; end after a signal that makes it tell where it is.
END, END_TELLING = b"e", b"t"


def descendants(root: int) -> list[int]:
    """The processes below another one, those that ended but were not waited for left out."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                after_name = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
                if after_name[0] not in (b"Z", b"X"):
                    children.setdefault(int(after_name[1]), []).append(int(entry.name))
    found, left = [], [root]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def main(job: int, control: int, parent: int) -> None:
    """Become the keeper; returns in the worker. `job` and `control` are sockets to the node."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    own = os.getpid()
    worker = os.fork()
    if not worker:
        os.close(control)
        _become_worker(libc, own)
        return
    os.close(job)
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    # Only the node ends a keeper.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=control) as node:
        status = _keep(worker, node, parent)
        left = _end_all(own)
        with contextlib.suppress(OSError):
            node.sendall(json.dumps({"status": status, "left": left}).encode())
    os._exit(0)


def _become_worker(libc: ctypes.CDLL, keeper: int) -> None:
    os.setsid()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(1)
    # Where memory runs out, this process is ended, not the node.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # A core file would hold images.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _keep(worker: int, node: socket.socket, parent: int) -> int:
    """Wait until the worker ended or has to; its status as `waitpid` gives it."""
    ended = os.pidfd_open(worker)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(node, select.POLLIN)
    status = -1
    while status < 0:
        ready = dict(waiting.poll(1000 * _LOOK_SECONDS))
        if node.fileno() in ready or os.getppid() != parent:
            told = b""
            with contextlib.suppress(OSError):
                told = node.recv(1)
            _ask_to_end(worker, ended, told == END_TELLING)
        while True:
            try:
                found, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not found:
                break
            if found == worker:
                status = code
    os.close(ended)
    return status


def _ask_to_end(worker: int, ended: int, tells: bool) -> None:
    """End a worker, at first gently where it may tell where it is."""
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    if tells:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)
        waiting.poll(1000 * GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    waiting.poll(1000 * _GONE_SECONDS)


def _end_all(own: int) -> int:
    """End all processes below this one; how many there were.

    They are stopped before they are killed, so that those that start others cannot outrun it.
    """
    end = time.monotonic() + _GONE_SECONDS
    met: set[int] = set()
    while (left := descendants(own)) and time.monotonic() < end:
        fresh = set(left) - met
        met |= fresh
        for pid in fresh or left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGSTOP if fresh else signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not fresh:
            time.sleep(0.01)
    return len(met)


def start() -> None:
    """What a fresh interpreter runs: `job control parent` as arguments."""
    job, control, parent = map(int, sys.argv[1:4])
    del sys.argv[1:]
    main(job, control, parent)
    from dicomnode.server.worker import serve

    serve(job)
