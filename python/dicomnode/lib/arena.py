"""An arena: images that are decoded one by one as they come, into the array that is asked for later.

Solves that a complete series need not wait for its decoding. Each frame goes into a place of one array
that has room for many: where its InstanceNumber says that it will be, or else the next. Mostly the
array of a series is then a part of that one, and nothing is copied; InstanceNumber has no influence
on more than that. An arena gives exactly what the ordinary way of reading gives, or nothing: whatever
it cannot do is left to the ordinary way, errors too.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from dicomnode.errors import DicomnodeError, InconsistentSeries, UnsupportedImage
from dicomnode.lib.dicom import LazyDataset, Source
from dicomnode.lib.images import (
    PALETTE,
    ImageHeader,
    Reading,
    Slice,
    check_image,
    fill,
    place_of,
    read_slices,
)
from dicomnode.lib.shared import new_shared, shared_array

# How many places there may be from the first to the last image: so many, and so many for each.
_FEW, _SPARSE = 512, 4


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, and its place in the arena."""

    item: Slice
    place: int


@dataclass(frozen=True, eq=False)
class HandedOver:
    """The images of an arena on their way to another process.

    `descriptor` is that of their shared memory, and is the owner's to close. `frames` are, of each
    image that was asked for, the place and the notes of each frame; None of one that is not there.
    The rows of `shape` start at the place `first`. `array` is the memory as this process sees it: to let
    that go takes a while, which the other one need not wait for.
    """

    reading: Reading
    descriptor: int
    array: NDArray[Any]
    first: int
    shape: tuple[int, ...]
    dtype: numpy.dtype[Any]
    frames: list[list[tuple[int, list[str]]] | None]


class Arena:
    """The decoded images of one input of one case. Safe to use from any thread.

    `reading` tells how pixels become values, `most_bytes` how much memory the images may take.
    `on_give_up` is called with the reason where they are left to the ordinary way. With `is_shared`
    they lie in memory that another process can get: see `hand_over`.
    """

    def __init__(
        self,
        reading: Reading,
        most_bytes: int,
        on_give_up: Callable[[str], None],
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        self._descriptor = -1
        self._reading = reading
        self._most_bytes = most_bytes
        self._on_give_up = on_give_up
        self._changed = threading.Condition()
        self._is_over = False
        self._array: NDArray[Any] | None = None
        # The first image is in the middle, since nobody knows yet in which direction it goes on.
        self._first: ImageHeader | None = None
        self._direction = 1
        self._used: set[int] = set()
        # The lowest and the highest of them.
        self._ends: tuple[int, ...] = ()
        self._pending = 0
        self._headers: dict[Source, list[ImageHeader]] = {}
        self._places: dict[ImageHeader, int] = {}
        # Of the frames that were decoded, and of no other.
        self._notes: dict[ImageHeader, list[str]] = {}

    @property
    def size(self) -> int:
        """How many bytes its images take at most.

        The places between them count: memory comes in pages that are larger than a small image.
        """
        array = self._array
        return 0 if array is None else self._span() * array[0].nbytes

    def _span(self, *places: int) -> int:
        """From the lowest to the highest place, with these ones."""
        used = (*places, *self._ends)
        return max(used) - min(used) + 1 if used else 0

    def add(self, source: Source) -> list[Frame]:
        """Find places for the frames of an image; `decode` has to be called with each of them."""
        with self._changed:
            if self._is_over or source in self._headers:
                return []
            try:
                items, _ = read_slices([LazyDataset(source)])
                frames = [Frame(item, self._place(item)) for item in items]
            except (DicomnodeError, OSError, MemoryError) as error:
                self._give_up(str(error))
                return []
            if items:
                self._headers[source] = [item.header for item in items]
            self._pending += len(frames)
            return frames

    def _place(self, item: Slice) -> int:
        header = item.header
        check_image(header)
        if header.photometric_interpretation == PALETTE and self._reading.color == "palette":
            raise UnsupportedImage(
                f"image {header.sop_instance_uid} gets its colours from a palette"
            )
        shape, dtype = place_of([item], self._reading)
        size = math.prod(shape) * dtype.itemsize
        most, count = self._most_bytes // size, len(self._used)
        if count >= most:
            raise MemoryError(
                f"{count + 1} images of {size} bytes are more than {self._most_bytes} bytes"
            )
        if self._array is None or self._first is None:
            self._array = self._allocated((2 * most - 1, *shape), dtype)
            self._first = header
        if (self._array.shape[1:], self._array.dtype) != (shape, dtype):
            raise InconsistentSeries(f"image {header.sop_instance_uid} has another size or type")
        offset = _offset(self._first, header)
        if count == 1:
            self._direction = _direction(self._first, header, offset)
        place = most - 1 + self._direction * (count if offset is None else offset)
        is_far = self._span(place) > _FEW + _SPARSE * (count + 1)
        if place in self._used or not 0 <= place < len(self._array) or is_far:
            place = max(self._ends, default=most - 1) + 1
        if place >= len(self._array) or self._span(place) > most:
            raise MemoryError("the images have numbers that are too far apart")
        self._used.add(place)
        self._ends = (min((place, *self._ends)), max((place, *self._ends)))
        self._places[header] = place
        return place

    def _allocated(self, shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> NDArray[Any]:
        """An array of which only what is written to takes memory."""
        if not self._is_shared:
            return numpy.empty(shape, dtype)
        self._descriptor = new_shared(math.prod(shape) * dtype.itemsize)
        return shared_array(self._descriptor, shape, dtype)

    def decode(self, frame: Frame) -> None:
        """Decode one frame into its place."""
        array, place = self._array, frame.place
        notes: list[str] = []
        problem = "the decoder failed"
        try:
            if array is not None:
                out = array[place : place + 1]
                notes = fill([frame.item], self._reading, out)
            problem = ""
        except (DicomnodeError, OSError, MemoryError) as error:
            problem = str(error)
        finally:
            with self._changed:
                self._pending -= 1
                if problem:
                    self._give_up(problem)
                elif not self._is_over:
                    self._notes[frame.item.header] = notes
                self._changed.notify_all()

    def headers(self, source: Source) -> list[ImageHeader] | None:
        """The headers of the frames of an image, as `take` wants them; None for one unknown here."""
        with self._changed:
            return self._headers.get(source)

    def take(
        self,
        headers: Sequence[ImageHeader],
        reading: Reading,
        shape: tuple[int, ...],
        dtype: numpy.dtype[Any],
    ) -> tuple[NDArray[Any], list[str]] | None:
        """See `Decoded`. Waits for what is being decoded.

        The array belongs to the caller: what was taken cannot be taken again.
        """
        if reading != self._reading:
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or not self._pending)
            array = self._array
            if array is None or not all(header in self._notes for header in headers):
                return None
            if (array.shape[1:], array.dtype) != (shape, dtype):
                return None
            places = [self._places[header] for header in headers]
            notes = [note for header in headers for note in self._notes[header]]
            for header in set(headers):
                del self._places[header], self._notes[header]
            if not self._places:
                # The memory is the caller's alone.
                self._end()
        return _rows(array, places), notes

    def hand_over(self, sources: Iterable[Source]) -> HandedOver | None:
        """The decoded images for another process, in which `received` takes them; gone from here.

        Waits for what is being decoded. None where there is nothing to hand over.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or not self._pending)
            array = self._array
            if array is None or not self._notes or self._descriptor < 0:
                return None
            first, last = self._ends
            frames = [
                [
                    (self._places[header] - first, self._notes[header])
                    for header in self._headers[source]
                ]
                if source in self._headers
                else None
                for source in sources
            ]
            descriptor, self._descriptor = self._descriptor, -1
            shape = (last - first + 1, *array.shape[1:])
            self._end()
            return HandedOver(self._reading, descriptor, array, first, shape, array.dtype, frames)

    @classmethod
    def received(
        cls,
        reading: Reading,
        array: NDArray[Any],
        frames: Mapping[Source, list[tuple[int, list[str]]] | None],
    ) -> "Arena":
        """The images that another process decoded: for each source the place and notes of its frames.

        Raises what reading the headers of the sources raises.
        """
        arena = cls(reading, array.nbytes, lambda _: None)
        known = [source for source, found in frames.items() if found is not None]
        headers: dict[Source, list[ImageHeader]] = {source: [] for source in known}
        for item in read_slices([LazyDataset(source) for source in known])[0]:
            if isinstance(item.dataset, LazyDataset):
                headers[item.dataset.source].append(item.header)
        for source in known:
            found = frames[source] or []
            if len(found) != len(headers[source]):
                return arena
            for header, (place, notes) in zip(headers[source], found, strict=True):
                arena._places[header], arena._notes[header] = place, notes
        arena._headers, arena._array = headers, array
        return arena

    def give_up(self, reason: str) -> None:
        """Leave these images to the ordinary way, and let their memory go."""
        with self._changed:
            self._give_up(reason)

    def close(self) -> None:
        """Let the memory go."""
        with self._changed:
            self._end()

    def _give_up(self, reason: str) -> None:
        if not self._is_over:
            self._end()
            self._on_give_up(reason)

    def _end(self) -> None:
        self._is_over = True
        self._array = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._headers = {}
        self._places = {}
        self._notes = {}
        self._changed.notify_all()


def _offset(first: ImageHeader, header: ImageHeader) -> int | None:
    """How many places after the first image this one is by their numbers; None where these are none."""
    if first.instance_number is None or header.instance_number is None:
        return None
    return None if header.number_of_frames > 1 else header.instance_number - first.instance_number


def _direction(first: ImageHeader, second: ImageHeader, offset: int | None) -> int:
    """-1 where the array goes down while the offset goes up, else 1."""
    if first.position is None or first.orientation is None or second.position is None:
        return 1
    normal = numpy.cross(first.orientation[:3], first.orientation[3:])
    distance = numpy.subtract(second.position, first.position) @ normal
    return -1 if distance * (1 if offset is None else offset) < 0 else 1


def _rows(array: NDArray[Any], places: Sequence[int]) -> NDArray[Any]:
    """These places of an array: a part of it where they follow each other, else a copy."""
    first, count = places[0], len(places)
    if list(places) == list(range(first, first + count)):
        return array[first : first + count]
    rows = numpy.empty((count, *array.shape[1:]), array.dtype)

    def copy(k: int) -> None:
        rows[k] = array[places[k]]

    with ThreadPoolExecutor() as pool:
        list(pool.map(copy, range(count)))
    return rows
