"""The reader of what arrives over an association, through its Python face.

What it gives is compared with pynetdicom's own decoding of the same bytes.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.pdu import P_DATA_TF
from tests.e2e import wire
from tests.e2e.wire import pdu, value

from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import JournalFile, Received, Receiver, digest, link, part10_prefix

DATA = bytes(k * 7 % 251 for k in range(5000))


BOTH = [(1, wire.IMPLICIT), (3, wire.EXPLICIT)]


def everything(
    chunks: Sequence[bytes],
    receiver: Receiver | None = None,
) -> list[Received | bytes]:
    """All that comes of bytes in these chunks."""
    if receiver is None:
        receiver = Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20)
    found = []
    for chunk in chunks:
        one = receiver.offer(chunk)
        while one is not None:
            found.append(one)
            one = receiver.offer(b"")
    assert receiver.total == sum(map(len, chunks))
    return found


def described(found: Sequence[Received | bytes]) -> list[Any]:
    return [
        one
        if isinstance(one, bytes)
        else (
            one.context_id,
            one.sop_class_uid,
            one.sop_instance_uid,
            bytes(memoryview(one)),
            one.size,
            one.digest.hex(),
        )
        for one in found
    ]


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The pieces between some places."""
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def message(context: int, command: bytes, data: bytes | None, cuts: Sequence[int]) -> list[bytes]:
    """The presentation data values of a message, cut into fragments."""
    values = []
    for kind, part in ((1, command), (0, data)):
        if part is not None:
            pieces = [piece for piece in split(part, cuts) if piece] or [b""]
            for k, piece in enumerate(pieces):
                values.append(value(context, kind + 2 * (k + 1 == len(pieces)), piece))
    return values


def grouped(values: Sequence[bytes], sizes: Sequence[int]) -> bytes:
    """The values in PDUs of so many each."""
    left, made, k = list(values), b"", 0
    while left:
        count = sizes[k % len(sizes)]
        made += pdu(wire.DATA, b"".join(left[:count]))
        del left[:count]
        k += 1
    return made


def test_every_split_of_a_session_into_two_gives_the_same() -> None:
    session = pdu(wire.DATA, value(1, 3, wire.echo_command()))
    session += wire.store("1.2.3.4", DATA[:100]) + wire.store("1.2.3.5", b"")
    session += pdu(wire.RELEASE, bytes(4))
    whole = described(everything([session]))
    assert len(whole) == 4
    assert whole[1][:4] == (3, wire.CT, "1.2.3.4", DATA[:100])
    assert whole[1][5] == hashlib.sha256(DATA[:100]).hexdigest()
    assert described(everything([bytes([byte]) for byte in session])) == whole
    for cut in range(len(session)):
        assert described(everything([session[:cut], session[cut:]])) == whole


cuts = st.lists(st.integers(0, 6000), max_size=12)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(cuts, sizes, cuts, st.integers(0, len(DATA)))
def test_n19_fragments_and_chunks_of_any_size_give_what_pynetdicom_decodes(
    fragments: list[int], together: list[int], chunks: list[int], length: int
) -> None:
    data = DATA[:length]
    values = message(3, wire.store_command("1.2.3.4", number=77), data, fragments)
    session = grouped(values, together)
    (found,) = everything(split(session, chunks))
    assert isinstance(found, Received)

    theirs = DIMSEMessage()
    at, is_whole = 0, False
    while at < len(session):
        end = at + 6 + int.from_bytes(session[at + 2 : at + 6], "big")
        decoded = P_DATA_TF()
        decoded.decode(session[at:end])
        is_whole = theirs.decode_msg(decoded.to_primitive())
        at = end
    request = theirs.message_to_primitive()  # type: ignore[attr-defined]
    assert is_whole
    assert found.context_id == theirs.context_id == 3
    assert found.sop_class_uid == request.AffectedSOPClassUID
    assert found.sop_instance_uid == request.AffectedSOPInstanceUID
    assert bytes(memoryview(found)) == request.DataSet.getvalue() == data
    answer = DIMSEMessage()
    reply = P_DATA_TF()
    reply.decode(found.response(0xB007, "why"))
    assert answer.decode_msg(reply.to_primitive())
    response = answer.message_to_primitive()  # type: ignore[attr-defined]
    assert (response.Status, response.MessageIDBeingRespondedTo) == (0xB007, 77)
    assert response.ErrorComment == "why"
    assert response.AffectedSOPInstanceUID == "1.2.3.4"


@settings(max_examples=100, deadline=None)
@given(cuts, sizes, cuts)
def test_messages_for_others_are_passed_on_whole_and_in_order(
    fragments: list[int], together: list[int], chunks: list[int]
) -> None:
    find = wire.command({0x2: b"1.2\0", 0x100: b"\x20\0", 0x110: b"\1\0", 0x800: b"\0\0"})
    values = message(1, wire.echo_command(), None, fragments)
    values += message(1, find, DATA, fragments)
    values += message(3, wire.store_command("1.2.3.4"), DATA, fragments)
    found = everything(split(grouped(values, together), chunks))
    assert isinstance(found[-1], Received)
    messages, theirs = [], DIMSEMessage()
    for one in found[:-1]:
        assert isinstance(one, bytes)
        decoded = P_DATA_TF()
        decoded.decode(one)
        if theirs.decode_msg(decoded.to_primitive()):
            messages.append(theirs)
            theirs = DIMSEMessage()
    assert [one.command_set.CommandField for one in messages] == [0x0030, 0x0020]
    assert messages[1].data_set.getvalue() == DATA


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), cuts, st.integers(0, 400))
def test_noise_is_an_error_or_waits_for_more(noise: bytes, chunks: list[int], at: int) -> None:
    session = bytearray(grouped(message(3, wire.store_command(), DATA[:200], [9]), [1, 2]))
    session[at : at + len(noise)] = noise
    receiver = Receiver(BOTH, 4096, 1 << 16, 1 << 16)
    with contextlib.suppress(InvalidDicom):
        everything(split(bytes(session), chunks), receiver)


def in_files(folder: Path, memory: int = 100_000, size: int = 32, least_free: int = 0) -> Receiver:
    return Receiver(
        BOTH[1:], 1 << 20, 1 << 24, memory, None, None, size, folder, least_free, "SENDER"
    )


def file_of(received: Received | bytes) -> bytes:
    """What is in its file."""
    assert isinstance(received, Received)
    descriptor, size = received.file or (-1, -1)
    assert os.fstat(descriptor).st_size == size
    return os.pread(descriptor, size, 0)


@pytest.mark.parametrize("chunk", [100, 4096, 65_536, 1 << 20])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("memory", [100_000, 1 << 24])
def test_a_dataset_is_in_its_file_and_little_of_a_large_one_in_memory(
    chunk: int, size: int, memory: int, tmp_path: Path
) -> None:
    data = DATA * 400
    session = grouped(message(3, wire.store_command("1.2.3.4"), data, range(0, 10**6, 9973)), [3])
    receiver = in_files(tmp_path, memory, size)
    found, most = [], 0
    for start in range(0, len(session), chunk):
        one = receiver.offer(session[start : start + chunk])
        most = max(most, receiver.arriving)
        while one is not None:
            found.append(one)
            one = receiver.offer(b"")
    (received,) = found
    assert isinstance(received, Received)
    is_large = memory < len(data)
    assert received.is_large is is_large and received.errno is None
    assert bytes(memoryview(received)) == (b"" if is_large else data)
    assert received.size == len(data)
    assert received.digest == digest(data, size)
    expected = part10_prefix(wire.CT, "1.2.3.4", wire.EXPLICIT, "SENDER") + data
    assert file_of(received) == expected
    assert most <= memory + chunk
    assert receiver.total == len(session) and not receiver.is_within and not receiver.is_large
    descriptor, size = received.file or (-1, -1)
    trouble = f"{size} of {size - 1} bytes are in the file"
    with pytest.raises(OSError, match=f"^too-short: {trouble}$"):
        link(descriptor, size - 1, str(tmp_path), "too-short", False)
    assert not list(tmp_path.iterdir())
    assert link(descriptor, size, str(tmp_path), "image.dcm", False)
    received.close()
    # What was linked stays.
    assert not Path(f"/proc/self/fd/{descriptor}").exists()
    assert received.file is None
    assert (tmp_path / "image.dcm").read_bytes() == expected


@pytest.mark.parametrize("before", [0, 100_000, 300_000, 1_500_000])
@pytest.mark.parametrize("memory", [400_000, 1 << 24])
def test_a_digest_is_the_same_where_all_processors_have_images(
    before: int, memory: int, tmp_path: Path
) -> None:
    """From that moment on the reading thread makes it, whatever has come by then."""
    data = DATA * 400
    session = wire.store("1.2.3.4", data)
    receiver = in_files(tmp_path, memory)
    assert receiver.offer(session[:before]) is None
    others = [in_files(tmp_path) for _ in range(os.cpu_count() or 1)]
    for one in others:
        assert one.offer(session[:20_000]) is None and one.is_arriving
    received = None
    for start in range(before, len(session), 50_000):
        assert received is None
        received = receiver.offer(session[start : start + 50_000])
    assert isinstance(received, Received) and received.is_large is (memory < len(data))
    assert received.digest == digest(data, 32)
    for one in others:
        one.close()


def test_each_dataset_has_a_file_of_its_own(tmp_path: Path) -> None:
    large = grouped(message(3, wire.store_command("1.2.3"), DATA * 50, [60_000]), [9])
    small = grouped(message(3, wire.store_command("1.2.4"), DATA, []), [9])
    empty = grouped(message(3, wire.store_command("1.2.5"), b"", []), [9])
    found = everything([large + small + empty + large], in_files(tmp_path))
    assert [one.is_large for one in found] == [True, False, False, True]  # type: ignore[union-attr]
    sizes = [DATA * 50, DATA, b"", DATA * 50]
    for one, uid, data in zip(found, ("1.2.3", "1.2.4", "1.2.5", "1.2.3"), sizes, strict=True):
        assert file_of(one) == part10_prefix(wire.CT, uid, wire.EXPLICIT, "SENDER") + data
    assert bytes(memoryview(found[1])) == DATA  # type: ignore[arg-type]


def test_what_cannot_be_written_is_told_and_read_to_its_end(tmp_path: Path) -> None:
    large = grouped(message(3, wire.store_command("1.2.3"), DATA * 50, []), [9])
    small = grouped(message(3, wire.store_command("1.2.4"), DATA, []), [9])
    for receiver, number in (
        (in_files(tmp_path, least_free=1 << 62), errno.ENOSPC),
        (in_files(tmp_path / "gone"), errno.ENOENT),
    ):
        found = everything(split(large + small, [3, 130_000]), receiver)
        assert [one.errno for one in found] == [number] * 2  # type: ignore[union-attr]
        assert [one.size for one in found] == [len(DATA) * 50, len(DATA)]  # type: ignore[union-attr]
        assert [one.file for one in found] == [None] * 2  # type: ignore[union-attr]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_gets_full_is_told(tmp_path: Path) -> None:
    large = grouped(message(3, wire.store_command("1.2.3"), DATA * 200, []), [9])
    small = grouped(message(3, wire.store_command("1.2.4"), DATA, []), [9])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", tmp_path], check=True)
    try:
        for memory in (100_000, 1 << 24):
            receiver = in_files(tmp_path, memory)
            (full,) = everything(split(large, [3, 130_000]), receiver)
            assert isinstance(full, Received) and full.errno == errno.ENOSPC
            del full
            other = receiver.offer(small)
            assert isinstance(other, Received) and other.errno is None
            assert file_of(other).endswith(DATA)
            del other
            receiver.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_what_has_to_stay_free_does_while_images_arrive(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", tmp_path], check=True)
    try:
        for memory in (1 << 20, 1 << 24):
            receiver = in_files(tmp_path, memory, least_free=2 << 20)
            session = wire.store("1.2.3", DATA * 700)
            for start in range(0, len(session), 50_000):
                found = receiver.offer(session[start : start + 50_000])
                status = os.statvfs(tmp_path)
                assert status.f_bavail * status.f_frsize >= 2 << 20
            assert isinstance(found, Received) and found.errno == errno.ENOSPC
            assert found.file is None
            assert bytes(memoryview(found)) == (b"" if found.is_large else DATA * 700)
            receiver.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_image_counts_as_arriving_until_it_is_dealt_with(tmp_path: Path) -> None:
    session = wire.store("1.2.3", DATA * 5)
    for receiver in (in_files(tmp_path), in_files(tmp_path, 5000)):
        assert not receiver.is_arriving
        assert receiver.offer(session[:60]) is None and not receiver.is_arriving
        assert receiver.offer(session[60:20_000]) is None and receiver.is_arriving
        assert receiver.offer(session[20_000:]) is not None and receiver.is_arriving
        receiver.answered()
        assert not receiver.is_arriving
        assert receiver.offer(b"") is None and not receiver.is_arriving
        assert receiver.offer(session[:20_000]) is None and receiver.is_arriving
        receiver.close()
        assert not receiver.is_arriving


@pytest.mark.parametrize("uid", ["", "x", "1.2/../3", "1" * 65])
def test_what_has_no_uid_has_no_file(uid: str, tmp_path: Path) -> None:
    for data in (DATA, DATA * 50):
        (one,) = everything([wire.store(uid, data)], in_files(tmp_path))
        assert isinstance(one, Received) and one.file is None
        assert one.errno is None and one.size == len(data)


def test_without_a_folder_a_large_dataset_is_read_and_dropped() -> None:
    large = grouped(message(3, wire.store_command("1.2.3"), DATA * 50, []), [9])
    (one,) = everything([large], Receiver(BOTH[1:], 1 << 20, 1 << 24, 100_000))
    assert isinstance(one, Received)
    assert one.is_large and one.errno is None and one.file is None
    assert memoryview(one).nbytes == 0 and one.size == len(DATA) * 50


def test_no_more_of_a_large_dataset_is_kept_than_wanted(tmp_path: Path) -> None:
    session = grouped(message(3, wire.store_command("1.2.3"), DATA * 50, []), [9])
    receiver = in_files(tmp_path)
    assert receiver.offer(session[:200_000]) is None and receiver.is_large
    receiver.discard(errno.ENOSPC)
    one = receiver.offer(session[200_000:])
    assert isinstance(one, Received) and one.is_large and one.errno == errno.ENOSPC
    assert one.file is None
    receiver.offer(session[:200_000])
    receiver.close()
    assert not receiver.is_large


@pytest.mark.parametrize(
    ("session", "told"),
    [
        (pdu(wire.DATA, b"", 0xFFFF_FFFF), "P-DATA-TF PDU of 4294967295 bytes"),
        (pdu(wire.DATA, b""), "without a value"),
        (pdu(0x99, b""), "type 0x99"),
        (pdu(wire.ABORT, b"", 1 << 20), "type 0x07 and 1048576 bytes"),
        (pdu(wire.DATA, value(5, 3, b"x")), "context 5"),
        (pdu(wire.DATA, value(3, 1, b"")), "empty fragment"),
        (pdu(wire.DATA, value(3, 2, b"x")), "dataset without its command"),
        (pdu(wire.DATA, value(3, 3, wire.store_command()) * 2), "within the dataset"),
        (pdu(wire.DATA, value(3, 3, b"\0\0\0\1\xff\0\0\0")), "cut off"),
        (wire.store("1.2", bytes(2 << 20)), "more than 1048576 bytes"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_breaks_the_protocol_is_an_error_that_tells_it(session: bytes, told: str) -> None:
    with pytest.raises(InvalidDicom, match=told):
        everything([session])
    with pytest.raises(InvalidDicom, match=told):
        everything([bytes([byte]) for byte in session[:2000]] + [session[2000:]])


def test_a_socket_is_read_until_it_is_woken_or_closed() -> None:
    ours, theirs = socket.socketpair()
    wake = os.eventfd(0)
    with ours, theirs:
        receiver = Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20, ours.fileno(), wake)
        assert receiver.receive(0.01) is None
        os.eventfd_write(wake, 1)
        assert receiver.receive(60.0) is None
        os.eventfd_read(wake)
        session = wire.store("1.2.3", DATA)
        theirs.sendall(session[:500])
        assert receiver.receive(0.01) is None
        assert receiver.is_within and receiver.total == 500
        theirs.sendall(session[500:] + pdu(wire.RELEASE, bytes(4)))
        one = receiver.receive(5.0)
        assert isinstance(one, Received) and bytes(memoryview(one)) == DATA
        assert receiver.receive(5.0) == pdu(wire.RELEASE, bytes(4))
        theirs.close()
        assert receiver.receive(5.0) == b""
    os.close(wake)


_Connection: TypeAlias = tuple[socket.socket, socket.socket, Receiver]


@contextmanager
def two_connections(folder: Path) -> Iterator[tuple[JournalFile, _Connection, _Connection]]:
    """A journal, and of each connection both ends and who reads it."""
    wake = os.eventfd(0)
    (ours, theirs), (mine, others) = socket.socketpair(), socket.socketpair()
    with ours, theirs, mine, others, (folder / "journal").open("w+b") as file:
        one, other = [
            Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20, number, wake, folder=folder)
            for number in (ours.fileno(), mine.fileno())
        ]
        records = JournalFile(file.fileno(), b"x" * 16, 0, 1 << 20, False)
        yield records, (ours, theirs, one), (mine, others, other)
    os.close(wake)


def test_beside_others_the_next_message_is_read_before_the_interpreter_is_taken_back(
    tmp_path: Path,
) -> None:
    def keep(one: Received, name: str) -> None:
        assert one.file is not None
        assert records.keep("text", *one.file, False, tmp_path, name, one, True)
        records.settle()
        one.close()

    def read(receiver: Receiver) -> Received:
        found = receiver.receive(5.0)
        assert isinstance(found, Received)
        return found

    image = wire.store("1.2.3", DATA)
    with two_connections(tmp_path) as (records, (_, theirs, one), (_, others, other)):
        theirs.sendall(image)
        first = read(one)
        time.sleep(0.1)
        theirs.sendall(image)
        # Nobody else brings anything.
        keep(first, "1")
        assert one.total == len(image)
        others.sendall(image)
        beside = read(other)
        second = read(one)
        assert one.total == 2 * len(image) and beside.status is None
        theirs.sendall(image + pdu(wire.RELEASE, bytes(4)))
        keep(second, "2")
        assert one.total == 3 * len(image) + 10 and one.is_arriving
        third = read(one)
        assert bytes(memoryview(third)) == DATA
        keep(third, "3")
        assert one.receive(5.0) == pdu(wire.RELEASE, bytes(4)) and not one.is_arriving
        answers = first.response(0) + second.response(0) + third.response(0)
        assert theirs.recv(1000) == answers
        theirs.close()
        assert one.receive(5.0) == b""
        # What breaks the protocol is told when it is asked for.
        others.sendall(bytes(6))
        keep(beside, "4")
        assert others.recv(1000) == beside.response(0)
        with pytest.raises(InvalidDicom):
            other.receive(5.0)


def test_what_was_read_ahead_waits_for_the_rest_of_an_answer(tmp_path: Path) -> None:
    image = wire.store("1.2.3", DATA)
    with two_connections(tmp_path) as (records, (ours, theirs, one), (_, others, other)):
        theirs.sendall(image * 2 + pdu(wire.RELEASE, bytes(4)))
        first = one.receive(5.0)
        others.sendall(image)
        beside = other.receive(5.0)
        assert isinstance(first, Received) and isinstance(beside, Received)
        # Read ahead before the answer, as it is while another record is written.
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while ours.send(bytes(1 << 16)):
                pass
        assert first.file is not None
        assert records.keep("text", *first.file, False, tmp_path, "1", None)
        second = one.receive(5.0)
        assert isinstance(second, Received)
        for image_of, name in ((first, "2"), (second, "3")):
            assert image_of.file is not None
            others.sendall(image)
            assert isinstance(other.receive(5.0), Received)
            assert records.keep("text", *image_of.file, False, tmp_path, name, image_of, True)
            assert one.receive(5.0) is None
        assert one.unsent() == first.response(0) + second.response(0)
        one.answered()
        assert one.receive(5.0) == pdu(wire.RELEASE, bytes(4))
        assert not one.is_within and not one.is_arriving
        # A release that is read ahead is not forgotten, also where nothing more comes.
        theirs.recv(1 << 24, socket.MSG_WAITALL | socket.MSG_DONTWAIT)
        theirs.sendall(image + pdu(wire.RELEASE, bytes(4)))
        third = one.receive(5.0)
        assert isinstance(third, Received) and third.file is not None
        others.sendall(image)
        assert isinstance(other.receive(5.0), Received)
        assert records.keep("text", *third.file, False, tmp_path, "4", third, True)
        assert one.is_within
        assert one.receive(5.0) == pdu(wire.RELEASE, bytes(4)) and not one.is_within


def test_what_a_socket_does_not_take_of_an_answer_is_left() -> None:
    ours, theirs = socket.socketpair()
    wake = os.eventfd(0)
    with ours, theirs:
        receiver = Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20, ours.fileno(), wake)
        theirs.sendall(wire.store("1.2.3", DATA))
        one = receiver.receive(5.0)
        assert isinstance(one, Received)
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while ours.send(bytes(1 << 16)):
                pass
        one.answer(0)
        # Nothing is read before that is sent.
        theirs.sendall(pdu(wire.RELEASE, bytes(4)))
        assert receiver.is_arriving and receiver.receive(5.0) is None and receiver.is_arriving
        assert receiver.unsent() == one.response(0) and receiver.unsent() == b""
        receiver.answered()
        assert not receiver.is_arriving
        assert receiver.receive(5.0) == pdu(wire.RELEASE, bytes(4))
    with pytest.raises(ValueError, match="wakes"):
        Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20, 0)
    unconnected = Receiver(BOTH, 1 << 20, 1 << 20, 1 << 20)
    two = unconnected.offer(wire.store("1.2.3", DATA))
    assert isinstance(two, Received)
    two.answer(0xA700, "no room")
    assert two.status == 0xA700 and unconnected.unsent() == two.response(0xA700, "no room")
    os.close(wake)


def test_the_file_of_the_next_image_is_open_once_an_answer_is_sent(tmp_path: Path) -> None:
    def opened() -> list[int]:
        found = []
        for one in Path("/proc/self/fd").iterdir():
            # That of the folder itself is closed by then.
            with contextlib.suppress(FileNotFoundError):
                if str(one.readlink()).startswith(f"{tmp_path}/"):
                    found.append(int(one.name))
        return found

    ours, theirs = socket.socketpair()
    wake = os.eventfd(0)
    with ours, theirs:
        receiver = Receiver(
            BOTH, 1 << 20, 1 << 20, 1 << 20, ours.fileno(), wake, folder=tmp_path, title="SENDER"
        )
        assert receiver.receive(0.01) is None and not opened()
        theirs.sendall(wire.store("1.2.3", DATA))
        one = receiver.receive(5.0)
        assert isinstance(one, Received) and one.status is None
        one.close()
        for status in (0, 0xA700):
            one.answer(status)
            assert one.status == 0 and receiver.unsent() == b""
            assert receiver.receive(0.01) is None
        assert theirs.recv(1000) == one.response(0)
        (spare,) = opened()
        theirs.sendall(wire.store("1.2.3", DATA) * 2)
        images = [receiver.receive(5.0) for _ in range(2)]
        for number, one in enumerate(images):
            assert isinstance(one, Received) and one.file is not None
            assert (one.file[0] == spare) is (number == 0)
            assert file_of(one).endswith(DATA)
        for one in images:
            one.close()  # type: ignore[union-attr]
        assert not opened()
        images[1].answer(0)  # type: ignore[union-attr]
        assert receiver.receive(0.01) is None and len(opened()) == 1
        receiver.close()
        assert not opened() and not list(tmp_path.iterdir())
    os.close(wake)


def test_memory_of_one_dataset_is_used_again_but_never_seen() -> None:
    receiver = Receiver(BOTH[1:], 1 << 20, 1 << 20, 1 << 20)
    (first,) = everything([wire.store("1.2.3", DATA)], receiver)
    view = memoryview(first)  # type: ignore[arg-type]
    del first
    (second,) = [receiver.offer(wire.store("1.2.4", b"x" * 3000))]
    assert bytes(view) == DATA
    del view
    third = receiver.offer(wire.store("1.2.5", b"y"))
    assert bytes(memoryview(second)) == b"x" * 3000  # type: ignore[arg-type]
    assert bytes(memoryview(third)) == b"y"  # type: ignore[arg-type]


def test_a_forked_process_makes_its_own_digests() -> None:
    script = """
import hashlib, os, time
from dicomnode.lib.dicom import Receiver
from tests.e2e import wire

def digested():
    data = os.urandom(200_000)
    receiver = Receiver([(3, wire.EXPLICIT)], 1 << 20, 1 << 20, 1 << 20)
    found = receiver.offer(wire.store("1.2.3", data))
    return found.digest == hashlib.sha256(data).digest()

assert digested()
if not os.fork():
    start = time.monotonic()
    os._exit(not (digested() and time.monotonic() - start < 5))
_, status = os.wait()
assert status == 0, status
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=60)
