"""Decoding on arrival without a network: when it answers, how much memory it takes, when it lets go."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.arena import Arena
from dicomnode.lib.grinders import (
    list_grinder,
    many_meta_grinder,
    numpy_grinder,
    tag_meta_grinder,
    volume_grinder,
)
from dicomnode.lib.images import Reading
from dicomnode.server import eager as module
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.input import AbstractInput, Datasets, eager_reading
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.store import Storage
from dicomnode.testing import make_series

from .test_storage import LOGGER, instances, opened

SLICE = 8 * 8 * 4


@contextmanager
def eager_over(
    storage: Storage, most_bytes: int = 10**6, inputs: tuple[str, ...] = ("ct",)
) -> Iterator[EagerDecoding]:
    one = EagerDecoding({name: Reading() for name in inputs}, storage, most_bytes, LOGGER)
    try:
        yield one
    finally:
        one.close()


def receive(
    storage: Storage, eager: EagerDecoding, count: int, patient_id: str = "P", seed: int = 1
) -> int:
    """The number of the case of so many images."""
    number = 0
    for instance in instances(count, patient_id, seed):
        number = storage.add(patient_id, ["ct"], instance)
        eager.add(patient_id, instance.sop_instance_uid)
    return number


def array_of(storage: Storage, eager: EagerDecoding, patient_id: str = "P") -> numpy.ndarray:
    contents = storage.current(patient_id)
    assert contents is not None
    decoded = eager.decoded(contents.case_id, "ct")
    return numpy_grinder(Datasets(contents.sources["ct"], decoded).values())


def expected(count: int) -> numpy.ndarray:
    return numpy_grinder(make_series(count, 8, 8))


def was_decoded(array: numpy.ndarray) -> bool:
    return not array.flags.owndata


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_received_is_decoded(on_disk: bool, tmp_path: Path) -> None:
    with opened(tmp_path if on_disk else None) as storage, eager_over(storage) as eager:
        receive(storage, eager, 5)
        array = array_of(storage, eager)
        assert was_decoded(array)
        numpy.testing.assert_array_equal(array, expected(5))
        # A second look is another array.
        again = array_of(storage, eager)
        assert not was_decoded(again)
        numpy.testing.assert_array_equal(again, array)


def test_other_inputs_are_left_alone() -> None:
    with opened(None) as storage, eager_over(storage, inputs=("mr",)) as eager:
        number = receive(storage, eager, 3)
        assert eager.decoded(number, "ct") is None and eager.decoded(number, "mr") is None


def test_a_node_without_eager_inputs_has_no_threads_and_does_nothing() -> None:
    with opened(None) as storage:
        before = threading.active_count()
        with eager_over(storage, inputs=()) as eager:
            assert threading.active_count() == before
            # Then a node does not tell it of images at all.
            assert not eager.is_wanted
        with eager_over(storage) as eager:
            assert eager.is_wanted


def test_an_answer_waits_until_hardly_any_decoding_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Semaphore(0), threading.Semaphore(0)
    decode = Arena.decode

    def slowly(arena: Arena, frame: Any) -> None:
        begun.release()
        assert go_on.acquire(timeout=10)
        decode(arena, frame)

    monkeypatch.setattr(Arena, "decode", slowly)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 30.0)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2})
    answered: list[int] = []
    with opened(None) as storage, eager_over(storage) as eager:

        def send() -> None:
            for k, instance in enumerate(instances(4)):
                storage.add("P", ["ct"], instance)
                eager.add("P", instance.sop_instance_uid)
                answered.append(k)

        sender = threading.Thread(target=send)
        sender.start()
        # With three threads, two may be left when an answer goes out.
        for _ in range(3):
            assert begun.acquire(timeout=10)
        sender.join(0.05)
        assert answered == [0, 1]
        go_on.release()
        assert begun.acquire(timeout=10)
        sender.join(0.05)
        assert answered == [0, 1, 2]
        for _ in range(3):
            go_on.release()
        sender.join(10)
        assert answered == [0, 1, 2, 3]
        numpy.testing.assert_array_equal(array_of(storage, eager), expected(4))


def test_an_answer_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    decode = Arena.decode

    def stuck(arena: Arena, frame: Any) -> None:
        assert go_on.wait(10)
        decode(arena, frame)

    monkeypatch.setattr(Arena, "decode", stuck)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.01)
    with opened(None) as storage, eager_over(storage) as eager:
        receive(storage, eager, 6)
        go_on.set()
        array = array_of(storage, eager)
        assert was_decoded(array)
        numpy.testing.assert_array_equal(array, expected(6))


def test_the_case_that_waited_longest_makes_room() -> None:
    with opened(None) as storage, eager_over(storage, most_bytes=6 * SLICE) as eager:
        for patient in ("A", "B"):
            receive(storage, eager, 3, patient)
        receive(storage, eager, 1, "A", seed=2)
        receive(storage, eager, 1, "C")
        decoded = {one: was_decoded(array_of(storage, eager, one)) for one in ("B", "C")}
        assert decoded == {"B": False, "C": True}
        numpy.testing.assert_array_equal(array_of(storage, eager, "B"), expected(3))
        contents = storage.current("A")
        assert contents is not None
        arena = eager.decoded(contents.case_id, "ct")
        assert isinstance(arena, Arena) and arena.size == 4 * SLICE


def test_a_case_that_is_too_large_gives_up_and_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    with (
        opened(None) as storage,
        eager_over(storage, most_bytes=3 * SLICE) as eager,
        caplog.at_level(logging.INFO),
    ):
        number = receive(storage, eager, 8)
        arena = eager.decoded(number, "ct")
        assert isinstance(arena, Arena) and arena.size == 0
        array = array_of(storage, eager)
        assert not was_decoded(array)
        numpy.testing.assert_array_equal(array, expected(8))
    said = [one.getMessage() for one in caplog.records if "not on arrival" in one.getMessage()]
    assert len(said) == 1 and "4 images of 256 bytes are more than 768 bytes" in said[0]


def test_a_case_is_dropped() -> None:
    with opened(None) as storage, eager_over(storage) as eager:
        numbers = [receive(storage, eager, 2, patient) for patient in ("A", "B")]
        arena = eager.decoded(numbers[0], "ct")
        assert isinstance(arena, Arena)
        eager.drop(numbers[0])
        assert arena.size == 0 and eager.decoded(numbers[0], "ct") is None
        assert was_decoded(array_of(storage, eager, "B"))


def test_nothing_is_decoded_for_a_case_that_was_claimed_meanwhile() -> None:
    with opened(None) as storage, eager_over(storage) as eager:
        (instance,) = instances(1)
        number = storage.add("P", ["ct"], instance)
        contents = storage.current("P")
        assert contents is not None and storage.settle("P", contents, complete=True)
        assert storage.seal(storage.ledger.case(number), contents)
        eager.add("P", instance.sop_instance_uid)
        assert eager.decoded(number, "ct") is None


def test_a_case_is_not_claimed_while_an_image_of_it_is_given_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add, waited = Arena.add, []

    def watched(arena: Arena, source: Any) -> Any:
        claimed = threading.Event()

        def claim() -> None:
            with storage.holding("P"):
                claimed.set()

        threading.Thread(target=claim).start()
        waited.append(not claimed.wait(0.1))
        return add(arena, source)

    monkeypatch.setattr(Arena, "add", watched)
    with opened(None) as storage, eager_over(storage) as eager:
        receive(storage, eager, 1)
        assert waited == [True] and was_decoded(array_of(storage, eager))


def test_closing_lets_everything_go_and_ends_the_threads() -> None:
    with opened(None) as storage:
        with eager_over(storage) as eager:
            before = set(threading.enumerate())
            number = receive(storage, eager, 3)
            threads = set(threading.enumerate()) - before
            assert threads and all(one.name.startswith("decoder") for one in threads)
            arena = eager.decoded(number, "ct")
            assert isinstance(arena, Arena)
        assert arena.size == 0 and not any(one.is_alive() for one in threads)
        eager.add("P", instances(1)[0].sop_instance_uid)
        numpy.testing.assert_array_equal(array_of(storage, eager), expected(3))


def test_decoders_go_on_after_what_nobody_thought_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("nobody thought of this")

    with opened(None) as storage, eager_over(storage) as eager:
        with monkeypatch.context() as patch:
            patch.setattr("dicomnode.lib.arena.fill", fail)
            receive(storage, eager, 5)
            assert not was_decoded(array_of(storage, eager))
        receive(storage, eager, 5, "Q")
        assert was_decoded(array_of(storage, eager, "Q"))
    assert caplog.text.count("ValueError: nobody thought of this") > 0


def of_a_user(datasets: Iterable[Dataset]) -> Any:
    return numpy_grinder(datasets) + 1


class One(AbstractInput):
    def validate(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("grinder", "reading"),
    [
        (numpy_grinder, Reading()),
        (staticmethod(volume_grinder), Reading()),
        (numpy_grinder(dtype="i2", values="stored"), Reading(numpy.dtype("i2"), "stored")),
        (volume_grinder(dtype="f8"), Reading(numpy.dtype("f8"))),
        (many_meta_grinder(list_grinder, many_meta_grinder(volume_grinder)), Reading()),
        (numpy_grinder(out=numpy.empty((1, 2, 3), "f4")), None),
        (volume_grinder(values="suv"), None),
        (list_grinder, None),
        (tag_meta_grinder(["PatientID"]), None),
        (many_meta_grinder(list_grinder), None),
        (of_a_user, None),
    ],
)
def test_how_an_eager_input_is_decoded(grinder: Any, reading: Reading | None) -> None:
    kind = type("Kind", (One,), {"image_grinder": grinder, "eager": True})
    assert eager_reading(kind) == reading
    assert eager_reading(type("Lazy", (kind,), {"eager": False})) is None
    pipeline = type("Node", (AbstractPipeline,), {"input": {"ct": kind}})
    if reading is None:
        with pytest.raises(IncorrectlyConfigured, match="'ct': Kind is eager"):
            pipeline(start=False)
    else:
        pipeline(start=False)


def test_eager_is_true_or_false() -> None:
    kind = type("Kind", (One,), {"image_grinder": numpy_grinder, "eager": "no"})
    with pytest.raises(IncorrectlyConfigured, match="True or False, not 'no'"):
        type("Node", (AbstractPipeline,), {"input": {"ct": kind}})(start=False)
