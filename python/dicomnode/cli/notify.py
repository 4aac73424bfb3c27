"""Telling a supervisor how a node is, in the words of sd_notify(3): a datagram to a socket."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping


def notifier(environment: Mapping[str, str]) -> Callable[[str], None] | None:
    """What sends a word such as `READY=1`; None where no supervisor listens.

    `WATCHDOG=1` is sent as often as the supervisor wants it, however often it is said.
    """
    place = environment.get("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):
        return None
    # An abstract socket is written with @ for its first byte.
    address = "\0" + place[1:] if place.startswith("@") else place
    interval = _watchdog_seconds(environment)
    last = 0.0

    def notify(word: str) -> None:
        nonlocal last
        if word == "WATCHDOG=1":
            now = time.monotonic()
            if interval is None or now - last < interval:
                return
            last = now
        # A supervisor that is gone is no reason to stop.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.settimeout(1.0)
            one.sendto(word.encode(), address)

    return notify


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """A third of the time after which the supervisor gives up; None where it does not watch us."""
    for_whom = environment.get("WATCHDOG_PID", "")
    if for_whom and for_whom != str(os.getpid()):
        return None
    wanted = environment.get("WATCHDOG_USEC", "")
    return int(wanted) / 3e6 if wanted.isdecimal() and int(wanted) else None
