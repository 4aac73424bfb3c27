"""Between a node and its workers: no pickle, small messages, and results that are not believed."""

import ast
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import dicomnode
from dicomnode.errors import InvalidDataset, OutOfResources, ProcessingFailed
from dicomnode.lib.arena import Arena
from dicomnode.lib.dicom import LazyDataset, encode
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.lib.images import Reading
from dicomnode.lib.shared import is_sealed, shared_array, view_shared, write_shared
from dicomnode.server.channel import BrokenChannel, Channel
from dicomnode.server.eager import EagerDecoding
from dicomnode.server.job import CaseLimits, Claimed, Stopped, WorkerLost, checked, verify_result
from dicomnode.server.workers import Workers, _received
from dicomnode.storage.instances import KEPT_BESIDES
from dicomnode.storage.shared import SharedInstances
from dicomnode.storage.store import Storage
from dicomnode.testing import make_series

# Modules that make objects out of bytes, whatever these say.
_PICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def test_p8_nothing_in_the_package_pickles() -> None:
    for path in Path(dicomnode.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(one.name for one in node.names)]
            found = {name.partition(".")[0] for name in names} & (_PICKLING | {"multiprocessing"})
            assert not found, f"{path} imports {found}"
        assert not re.search(r"allow_pickle\s*=\s*True", path.read_text("utf-8"))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    one, other = socket.socketpair()
    other.settimeout(10)
    one.settimeout(10)
    with one, other:
        yield Channel(one, 1000), other


def test_p8_a_message_is_json_and_memory_goes_along_as_a_descriptor(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, other = pair
    memory = write_shared([b"pixels" * 100_000])
    channel.send({"result": ["1.2", "3"]}, [memory])
    os.close(memory)
    body = b'{"result": ["1.2", "3"]}'
    assert other.recv(1000) == len(body).to_bytes(4, "big") + body


def test_a_message_and_its_descriptors_arrive() -> None:
    one, other = socket.socketpair()
    with one, other:
        memories = [write_shared([f"memory {k}".encode()]) for k in range(3)]
        text = "x" * 3_000_000
        sender = threading.Thread(target=Channel(one).send, args=({"text": text}, memories))
        sender.start()
        message, descriptors = Channel(other).receive(10) or ({}, [])
        sender.join(10)
        assert message["text"] == text
        assert [bytes(view_shared(one)) for one in descriptors] == [
            f"memory {k}".encode() for k in range(3)
        ]
        for descriptor in (*memories, *descriptors):
            os.close(descriptor)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\2[]",
        b"\0\0\0\4null",
        b"\0\0\0\3{{}",
        b"\0\0\0\2\xff\xfe",
        b"\xff\xff\xff\xff",
        b"\0\0\x03\xe7" + b"[" * 999,
        b"\x80\x04\x95" + b"\0" * 1000,  # how a pickle begins
    ],
)
def test_p8_what_is_no_message_is_an_error(
    data: bytes, pair: tuple[Channel, socket.socket]
) -> None:
    channel, other = pair
    other.sendall(data)
    with pytest.raises(BrokenChannel):
        channel.receive(10)


def test_half_a_message_and_then_nothing_is_the_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    other.sendall(b"\0\0\0\x09{}")
    other.shutdown(socket.SHUT_WR)
    assert channel.receive(10) is None


def test_who_ends_without_having_read_all_is_the_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    channel.send({"a": 1})
    other.close()
    assert channel.receive() is None


def test_waiting_for_a_message_ends(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with pytest.raises(TimeoutError):
        channel.receive(0.01)


def result() -> tuple[list[str], bytes]:
    one = make_series(1)[0]
    data, syntax = encode(one)
    return [str(one.SOPInstanceUID), str(one.SOPClassUID), syntax], data


def received(told: Any, data: bytes, is_sealed: bool = True) -> Any:
    memory = write_shared([data]) if is_sealed else os.memfd_create("test")
    if not is_sealed:
        os.write(memory, data)
    try:
        return _received(told, [memory])
    finally:
        os.close(memory)


def test_p6_a_result_is_taken_as_it_is() -> None:
    told, data = result()
    uid, sop_class, syntax, view = received(told, data)
    assert [uid, sop_class, syntax] == told and bytes(view) == data


@pytest.mark.parametrize("place", [0, 1, 2])
def test_p6_a_result_that_is_another_than_told_is_none(place: int) -> None:
    told, data = result()
    told[place] = "1.2.3"
    with pytest.raises(InvalidDataset, match="another"):
        received(told, data)


def test_p6_a_result_that_may_still_change_is_none() -> None:
    told, data = result()
    with pytest.raises(InvalidDataset, match="may still change"):
        received(told, data, is_sealed=False)


@pytest.mark.parametrize("cut", [0, 100, 200, 1000])
def test_p6_a_result_that_is_cut_off_is_none(cut: int) -> None:
    told, data = result()
    with pytest.raises(InvalidDataset):
        received(told, data[:cut])


@pytest.mark.parametrize("told", [None, "1.2", [], ["1.2"], ["../../x", "1.2", "1.2"]])
def test_p6_what_is_no_result_is_none(told: Any) -> None:
    with pytest.raises((InvalidDataset, ProcessingFailed)):
        received(told, result()[1])


def test_p6_results_have_valid_uids() -> None:
    told, data = result()
    with pytest.raises(InvalidDataset, match="no valid UIDs"):
        verify_result("1.2/3", told[1], told[2], data)


def test_p6_too_many_results_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicomnode.server.job.MOST_RESULTS", 3)
    results = ((f"1.{k}", "1.2", "1.3", b"") for k in range(10))
    with pytest.raises(InvalidDataset, match="more than 3"):
        list(checked(results, CaseLimits()))


def test_sealed_memory_cannot_be_changed() -> None:
    memory = write_shared([b"abc", memoryview(b"def")])
    try:
        assert is_sealed(memory) and bytes(view_shared(memory)) == b"abcdef"
        for change in (
            lambda: os.write(memory, b"x"),
            lambda: os.ftruncate(memory, 0),
            lambda: os.pwrite(memory, b"x", 0),
        ):
            with pytest.raises(OSError, match="not permitted"):
                change()
    finally:
        os.close(memory)


def test_an_arena_is_handed_over_as_it_is() -> None:
    series = make_series(7, 16, 24)
    arena = Arena(Reading(), 10**6, [].append, is_shared=True)
    sources = [encode(one)[0] for one in series]
    for source in sources:
        for frame in arena.add(source):
            arena.decode(frame)
    handed = arena.hand_over(sources)
    assert handed is not None and arena.hand_over(sources) is None
    array = shared_array(handed.descriptor, handed.shape, handed.dtype, handed.first)
    os.close(handed.descriptor)
    there = Arena.received(handed.reading, array, dict(zip(sources, handed.frames, strict=True)))
    found = numpy_grinder([LazyDataset(source, decoded=there) for source in sources])
    assert numpy.shares_memory(found, array)
    assert numpy.array_equal(found, numpy_grinder(series))
    # Once more it is read in the ordinary way.
    again = numpy_grinder([LazyDataset(source, decoded=there) for source in sources])
    assert numpy.array_equal(again, found) and not numpy.shares_memory(again, array)


def test_an_arena_of_its_own_memory_is_not_handed_over() -> None:
    arena = Arena(Reading(), 10**6, [].append)
    source = encode(make_series(1)[0])[0]
    for frame in arena.add(source):
        arena.decode(frame)
    assert arena.hand_over([source]) is None


def test_shared_instances_count_once_and_are_gone_with_their_last_place() -> None:
    instances = SharedInstances(2 * (4096 + KEPT_BESIDES) + 2000)
    with instances.staging([b"a" * 3000, b"b"]) as staged:
        assert instances.place(staged, "one", "x")
    with instances.placed("one", "x") as staged:
        assert instances.place(staged, "two", "x")
    assert instances.size("one", "x") == 3001
    path = Path(str(instances.source("one", "x")))
    assert path.read_bytes() == b"a" * 3000 + b"b"
    with instances.staging([b"c" * 3000]) as staged:
        assert not instances.place(staged, "one", "x")
        assert instances.place(staged, "one", "y")
    with pytest.raises(OutOfResources, match="memory_limit"), instances.staging([b"d" * 3000]):
        pass
    instances.remove("one", ["x"])
    assert path.exists()
    instances.remove("two", ["x"])
    assert not path.exists() and instances.size("one", "x") is None
    instances.close()
    assert not [one for one in Path("/proc/self/fd").iterdir() if int(one.name) >= 4096]


def test_s7_a_case_whose_worker_is_gone_before_it_begins_is_not_taken_for_one_of_a_node_that_stops() -> (
    None
):
    logger = logging.getLogger("dicomnode.test")
    eager = EagerDecoding({}, Storage(None, [], 0x00100020, 0, logger), 0, logger)
    workers = Workers({}, set(), 1, CaseLimits(), None, eager, None, logger)
    with pytest.raises(WorkerLost, match="before the case began"):
        next(workers.process(1, Claimed({}, {}), lambda _: None))
    workers.stop()
    with pytest.raises(Stopped):
        next(workers.process(1, Claimed({}, {}), lambda _: None))
    eager.close()
