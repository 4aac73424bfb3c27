"""Decoding on arrival: the images of eager inputs are decoded while their association is still open.

Solves that `process` waits for the decoding of a whole series, which takes seconds for JPEG 2000. Each
image is decoded after it was made durable, in threads of its own, and the answer to its sender waits
until hardly any decoding is left, so that the sender goes no faster than the decoders. Nothing depends
on it: what is not decoded here, for whatever reason, is decoded when it is ground.
"""

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from dicomnode.lib.arena import Arena, Frame
from dicomnode.lib.images import Reading
from dicomnode.storage.store import Storage

# An answer waits no longer, however slow the decoder is.
_PATIENCE_SECONDS = 5.0


class EagerDecoding:
    """Decoders over one storage. `readings` are those of the eager inputs, by name.

    With `is_shared` the images lie in memory that another process can get.
    """

    def __init__(
        self,
        readings: Mapping[str, Reading],
        storage: Storage,
        most_bytes: int,
        logger: logging.Logger,
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        self._readings = dict(readings)
        self._storage = storage
        self._most_bytes = most_bytes
        self._logger = logger
        self._lock = threading.Lock()
        # The one that got an image last is the last.
        self._arenas: dict[tuple[int, str], Arena] = {}
        self._left = 0
        self._fewer = threading.Condition()
        self._is_closed = False
        self._count = len(os.sched_getaffinity(0))
        # Its threads start with the first image.
        self._pool = ThreadPoolExecutor(self._count, "decoder")

    def close(self) -> None:
        """Stop the threads after the images that they decode now, and let all memory go."""
        with self._lock:
            self._is_closed = True
            arenas, self._arenas = list(self._arenas.values()), {}
        for arena in arenas:
            arena.close()
        self._pool.shutdown(cancel_futures=True)

    @property
    def is_wanted(self) -> bool:
        """Whether there is an eager input."""
        return bool(self._readings)

    def add(self, identifier: str, uid: str) -> None:
        """Begin to decode an image that was stored, and wait until hardly any decoding is left."""
        if self._is_closed:
            return
        self._begin(identifier, uid)
        with self._fewer:
            self._fewer.wait_for(lambda: self._left < self._count, _PATIENCE_SECONDS)

    def _begin(self, identifier: str, uid: str) -> None:
        # While this is held the case stays open: what belongs to it is let go when it is claimed.
        with self._storage.holding(identifier):
            case_id, sources = self._storage.sources(identifier, uid)
            for name, source in sources.items():
                if name in self._readings:
                    arena = self._arena(case_id, name)
                    for frame in arena.add(source):
                        self._decode(arena, frame)
        self._make_room()

    def decoded(self, case_id: int, input_name: str) -> Arena | None:
        """What was decoded for an input of a case."""
        with self._lock:
            return self._arenas.get((case_id, input_name))

    def drop(self, case_id: int) -> None:
        """Let go what was decoded for a case that takes no images any more."""
        with self._lock:
            mine = [key for key in self._arenas if key[0] == case_id]
            arenas = [self._arenas.pop(key) for key in mine]
        for arena in arenas:
            arena.close()

    def _arena(self, case_id: int, name: str) -> Arena:
        key = (case_id, name)
        with self._lock:
            arena = self._arenas.pop(key, None)
            if arena is None:
                tell = partial(self._tell, case_id, name)
                arena = Arena(self._readings[name], self._most_bytes, tell, self._is_shared)
            self._arenas[key] = arena
            return arena

    def _tell(self, case_id: int, name: str, reason: str) -> None:
        self._logger.info(
            "case %d: input %r is decoded when it is ground, not on arrival: %s",
            case_id,
            name,
            reason,
        )

    def _make_room(self) -> None:
        """Give up the arenas that have waited longest, where there are too many bytes."""
        with self._lock:
            arenas = list(self._arenas.values())
        used = sum(arena.size for arena in arenas)
        for arena in arenas:
            if used <= self._most_bytes:
                break
            used -= arena.size
            if arena.size:
                arena.give_up(f"decoded images would take more than {self._most_bytes} bytes")

    def _decode(self, arena: Arena, frame: Frame) -> None:
        try:
            future = self._pool.submit(arena.decode, frame)
        except RuntimeError:
            arena.give_up("the node ends")
            return
        with self._fewer:
            self._left += 1
        future.add_done_callback(self._settle)

    def _settle(self, future: "Future[None]") -> None:
        # The case is not touched: it is decoded when it is ground, and fails there if at all.
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._logger.error("an image was not decoded on arrival", exc_info=error)
        with self._fewer:
            self._left -= 1
            self._fewer.notify_all()
