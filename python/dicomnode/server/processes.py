"""What the system tells about worker processes: how one ended, and how much memory they take.

Solves that a case is FAILED with the reason, which no process that was killed can tell itself.
"""

import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Signals that others send: what they end is not the case's fault.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT}


@dataclass(frozen=True)
class Ending:
    """How a worker ended; `status` None where nobody can tell."""

    status: int | None = None
    left: int = 0
    #: Whether the kernel ended anything for want of memory meanwhile; None where nobody can tell.
    is_short_of_memory: bool | None = None

    def __str__(self) -> str:
        if self.status is None:
            return "its keeper was killed"
        if os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL:
            if self.is_short_of_memory is False:
                return (
                    "killed by signal 9 (SIGKILL), and not by the kernel for want of memory: by somebody, "
                    "or by a program that watches over memory, such as systemd-oomd"
                )
            return (
                "killed by signal 9 (SIGKILL), probably out of memory; set process_memory below what the "
                "machine or its container has for each worker, use fewer workers, or add memory"
            )
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            with contextlib.suppress(ValueError):
                return f"signal {number} ({signal.Signals(number).name})"
            return f"signal {number}"
        return f"exit code {os.waitstatus_to_exitcode(self.status)}"

    @property
    def is_from_outside(self) -> bool:
        """Whether the signal is one that others send, such as the kernel where memory runs out."""
        return (
            self.status is not None
            and os.WIFSIGNALED(self.status)
            and os.WTERMSIG(self.status) in _FROM_OUTSIDE
        )


def memory_of(pids: Collection[int], limit: int) -> int:
    """Bytes of memory that processes take together, of their own and shared.

    Pages that several of them see count in each, unless that would be beyond the limit: then the
    kernel is asked for shares, which takes longer.
    """
    used = sum(_values(pid, "status", ("RssAnon", "RssShmem")) for pid in pids)
    if used <= limit:
        return used
    return sum(_values(pid, "smaps_rollup", ("Pss_Anon", "Pss_Shmem")) for pid in pids)


def kills_for_memory() -> int | None:
    """How many processes the kernel has ended for want of memory; None where it does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def _values(pid: int, file: str, names: tuple[str, ...]) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                total += 1024 * int(value.split()[0])
    return total
