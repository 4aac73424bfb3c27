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


def descendants(root: int) -> dict[int, tuple[int, int]]:
    """The processes below another one, with the group and the number of threads of each.

    Those that ended but were not waited for are left out.
    """
    children: dict[int, list[tuple[int, int, int]]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (many times a second)
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    after_name = file.read().rpartition(b")")[2].split()
                if after_name[0] not in (b"Z", b"X"):
                    one = (int(name), int(after_name[2]), int(after_name[17]))
                    children.setdefault(int(after_name[1]), []).append(one)
    found: dict[int, tuple[int, int]] = {}
    left = [root]
    while left:
        for pid, group, threads in children.get(left.pop(), []):
            found[pid] = group, threads
            left.append(pid)
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
    """End a worker and its group, at first gently where it may tell where it is."""
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    if tells:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)
        waiting.poll(1000 * GRACE_SECONDS)
    # It leads a group, unless it has hardly begun.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(worker, signal.SIGKILL)
    waiting.poll(1000 * _GONE_SECONDS)


def _end_all(own: int) -> int:
    """End all processes below this one; how many there were.

    They are stopped before they are killed, and group by group, of which none can start another
    process meanwhile: so those that start others cannot outrun it. A worker leads a session of its own,
    so nothing else is in these groups.
    """
    end = time.monotonic() + _GONE_SECONDS
    met: set[int] = set()
    while (left := descendants(own)) and time.monotonic() < end:
        fresh = left.keys() - met
        met |= fresh
        number = signal.SIGSTOP if fresh else signal.SIGKILL
        groups = {left[pid][0] for pid in fresh or left}
        for group in groups - {os.getpgrp()}:
            with contextlib.suppress(OSError):
                os.killpg(group, number)
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
