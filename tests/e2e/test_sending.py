"""Sending over a socket of our own: deadlines, broken peers, conversion, many kinds of objects."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless, RLELossless
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.presentation import build_context
from tests.e2e.programs import serving

from dicomnode.errors import CouldNotCompleteDIMSEMessage, PeerUnreachable
from dicomnode.lib import requestor
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.testing import StoringNode, address_of, make_series, running_node

CT = "1.2.840.10008.5.1.4.1.1.2"


@contextmanager
def peer(
    contexts: list[Any], on_store: Callable[[Any], int] = lambda event: 0, **settings: Any
) -> Iterator[Address]:
    ae = AE(ae_title="PEER")
    for name, value in settings.items():
        setattr(ae, name, value)
    server = ae.start_server(
        ("127.0.0.1", 0),
        block=False,
        contexts=contexts,
        evt_handlers=[(evt.EVT_C_STORE, on_store), (evt.EVT_C_ECHO, lambda event: 0)],
    )
    try:
        yield Address("127.0.0.1", server.server_address[1], "PEER")
    finally:
        server.shutdown()


@contextmanager
def proxy(
    target: Address, serve: Callable[[socket.socket, socket.socket], None]
) -> Iterator[Address]:
    """Between a sender and its peer: `serve` gets both connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            try:
                while True:
                    client, _ = server.accept()
                    upstream = socket.create_connection((target.ip, target.port))
                    threading.Thread(target=serve, args=(client, upstream), daemon=True).start()
            except OSError:
                return

        threading.Thread(target=run, daemon=True).start()
        yield Address("127.0.0.1", server.getsockname()[1], target.ae_title)
        server.shutdown(socket.SHUT_RDWR)


def copy_answers(client: socket.socket, upstream: socket.socket) -> None:
    try:
        while data := upstream.recv(65536):
            client.sendall(data)
    except OSError:
        pass


def big() -> Dataset:
    (image,) = make_series(1, 8, 8)
    image.Rows, image.Columns = 4096, 2048
    image.PixelData = b"\0" * (4096 * 2048 * 2)
    return image


def test_x2_a_peer_that_stops_to_read_is_left_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requestor, "_ANSWER_SECONDS", 1.0)
    over = threading.Event()

    def stall(client: socket.socket, upstream: socket.socket) -> None:
        threading.Thread(target=copy_answers, args=(client, upstream), daemon=True).start()
        upstream.sendall(client.recv(65536))
        over.wait(60)
        client.close()
        upstream.close()

    with peer([build_context(CT)]) as target, proxy(target, stall) as address:
        start = time.monotonic()
        with pytest.raises(CouldNotCompleteDIMSEMessage, match="does not read"):
            send(address, [big()])
        assert time.monotonic() - start < 15
        over.set()


def test_x3_a_slow_peer_gets_the_time_that_its_rate_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requestor, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(requestor, "_LEAST_BYTES_PER_SECOND", 1 << 20)

    def drip(client: socket.socket, upstream: socket.socket) -> None:
        threading.Thread(target=copy_answers, args=(client, upstream), daemon=True).start()
        try:
            while data := client.recv(1 << 18):
                upstream.sendall(data)
                time.sleep(0.04)
        except OSError:
            pass

    with peer([build_context(CT)]) as target, proxy(target, drip) as address:
        start = time.monotonic()
        (answer,) = send(address, [big()])
        assert answer.is_stored and time.monotonic() - start > 1.0


@pytest.mark.parametrize("after", [200_000, 5_000_000])
def test_x2_a_connection_that_is_cut_in_the_middle_of_an_object_is_told_at_once(after: int) -> None:
    def cut(client: socket.socket, upstream: socket.socket) -> None:
        threading.Thread(target=copy_answers, args=(client, upstream), daemon=True).start()
        seen = 0
        while seen < after:
            data = client.recv(65536)
            seen += len(data)
            upstream.sendall(data)
        client.close()
        upstream.close()

    with peer([build_context(CT)]) as target, proxy(target, cut) as address:
        start = time.monotonic()
        with pytest.raises(CouldNotCompleteDIMSEMessage, match="is lost"):
            send(address, [big()])
        assert time.monotonic() - start < 10


def test_x4_an_abort_in_the_middle_of_a_series_is_told_at_once() -> None:
    def abort(client: socket.socket, upstream: socket.socket) -> None:
        threading.Thread(target=copy_answers, args=(client, upstream), daemon=True).start()
        upstream.sendall(client.recv(65536))
        client.recv(100)
        client.sendall(b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00")
        over.wait(60)
        client.close()
        upstream.close()

    over = threading.Event()
    got: list[Any] = []
    with peer([build_context(CT)]) as target, proxy(target, abort) as address:
        start = time.monotonic()
        with pytest.raises(CouldNotCompleteDIMSEMessage, match="aborted"):
            send(address, [big()], on_response=got.append)
        assert time.monotonic() - start < 10
        over.set()
    assert got == []


@pytest.mark.parametrize(
    "answer",
    [
        b"\x02\x00\x00\x00\x00\x04junk",
        b"\x04\x00\x00\x00\x00\x02\x00\x00",
        b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00",
        b"\x03\x00\x00\x00\x00\x04\x00\x09\x09\x09",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x02\x00\xff\xff\xff\xff" + b"x" * 300_000,
        b"",
    ],
)
def test_whatever_a_peer_answers_to_the_request_it_is_an_error_of_ours(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                with suppress(OSError):
                    client.sendall(answer)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        with pytest.raises(PeerUnreachable, match="ODD@"):
            echo(Address("127.0.0.1", server.getsockname()[1], "ODD"))
        thread.join(10)


def test_x1_a_host_that_is_not_there_is_told_within_the_connect_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requestor, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(PeerUnreachable, match="cannot be reached"):
        echo(Address("192.0.2.1", 104, "NOWHERE"))


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("accepted", [ImplicitVRLittleEndian, "1.2.840.10008.1.2.1"])
def test_what_a_peer_takes_only_uncompressed_is_decompressed(syntax: Any, accepted: str) -> None:
    image = dcmread(str(pydicom.data.get_testdata_file("MR_small.dcm")))
    pixels = image.pixel_array
    if syntax == JPEGLSLossless:
        image = dcmread(str(pydicom.data.get_testdata_file("MR_small_jpeg_ls_lossless.dcm")))
    else:
        image = dcmread(str(pydicom.data.get_testdata_file("MR_small_RLE.dcm")))
    stored = []

    def keep(event: Any) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        stored.append(dataset)
        return 0

    with peer([build_context(image.SOPClassUID, accepted)], keep) as address:
        (answer,) = send(address, [image])
    assert answer.is_stored
    assert stored[0].file_meta.TransferSyntaxUID == accepted
    assert numpy.array_equal(stored[0].pixel_array, pixels)


def test_what_a_peer_takes_compressed_goes_as_it_is(tmp_path: Path) -> None:
    path = Path(str(pydicom.data.get_testdata_file("MR_small_RLE.dcm")))
    with running_node(StoringNode) as store:
        (answer,) = send(address_of(store), load(path))
        assert answer.status == 0
        assert store.received[0].file_meta.TransferSyntaxUID == RLELossless
        assert store.received[0].PixelData == dcmread(path).PixelData


def test_more_kinds_of_objects_than_an_association_has_contexts_go_over_several() -> None:
    classes = [str(one.abstract_syntax) for one in AllStoragePresentationContexts][:70]
    images = make_series(140, 2, 2)
    for k, image in enumerate(images):
        image.SOPClassUID = classes[k % 70]
    associations = set()
    lock = threading.Lock()

    def keep(event: Any) -> int:
        with lock:
            associations.add(event.assoc)
        return 0

    with peer([build_context(one) for one in classes], keep) as address:
        got: list[Any] = []
        answers = send(address, images, on_response=got.append)
    assert [one.sop_instance_uid for one in answers] == [str(one.SOPInstanceUID) for one in images]
    assert all(one.is_stored for one in answers) and len(got) == 140
    assert len(associations) == 2


def test_a_dataset_that_cannot_be_written_is_its_own_answer_only() -> None:
    images = make_series(3, 2, 2)
    images[1].Rows = "many"
    with running_node(StoringNode) as store:
        answers = send(address_of(store), images)
    assert [hex(one.status) for one in answers] == ["0x0", "0xc000", "0x0"]


@pytest.mark.parametrize("limit", [0, 128, 4096, 16384, 1 << 24])
def test_parts_are_as_long_as_the_peer_wants(limit: int) -> None:
    stored = []
    images = make_series(2, 33, 35)

    def keep(event: Any) -> int:
        stored.append(event.dataset.PixelData)
        return 0

    with peer([build_context(CT)], keep, maximum_pdu_size=limit) as address:
        answers = send(address, images)
    assert all(one.is_stored for one in answers)
    assert stored == [image.PixelData for image in images]


def test_storescp_gets_every_byte(tmp_path: Path) -> None:
    folder = tmp_path / "received"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = Address("127.0.0.1", port, "STORESCP")
    images = make_series(20, 64, 64)
    with serving(["/usr/bin/storescp", "+B", "-od", folder, port], address):
        assert all(one.is_stored for one in send(address, images))
    received = [dcmread(path) for path in sorted(folder.iterdir())]
    assert numpy.array_equal(numpy_grinder(received), numpy_grinder(images))
