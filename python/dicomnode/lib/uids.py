"""New UIDs that are the same when the same is made again.

Solves that results which have to be made a second time, after a crash, are the same objects for whoever
has got them already. The images of a case carry a source of UIDs with them, so that it is there in
whatever thread or process the results are made; images from elsewhere have none, and get random UIDs.
"""

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Iterable

from pydicom.uid import UID, generate_uid


class Uids:
    """The UIDs of one run of process(): the same `seed` gives the same ones. For any thread."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self._made: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def series(self, about: Iterable[str]) -> "SeriesUids":
        """The UIDs of a new series, of which `about` tells what it is made of and what it is called.

        The second series about the same has others.
        """
        digest = _digest(self.seed, *about)
        with self._lock:
            self._made[digest] += 1
            count = self._made[digest]
        return SeriesUids(_digest(digest, str(count)))


class SeriesUids:
    """The UIDs of a series and of its instances; random ones without a seed."""

    def __init__(self, seed: bytes | None = None) -> None:
        self._seed = seed

    def series(self) -> UID:
        """Its SeriesInstanceUID."""
        return self.instance(-1)

    def instance(self, number: int) -> UID:
        """The SOPInstanceUID of one instance, which is numbered from 0."""
        if self._seed is None:
            return generate_uid()
        # A UUID of version 8, made from a digest (RFC 9562), as a UID (PS3.5 annex B.2).
        value = bytearray(_digest(self._seed, str(number))[:16])
        value[6] = value[6] & 0x0F | 0x80
        value[8] = value[8] & 0x3F | 0x80
        return UID(f"2.25.{uuid.UUID(bytes=bytes(value)).int}")


def _digest(seed: bytes, *texts: str) -> bytes:
    digest = hashlib.sha256(seed)
    for text in texts:
        encoded = text.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()
