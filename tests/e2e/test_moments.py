"""What happens in the same moment: repeats that expire, floods, connections that close too early."""

import hashlib
import random
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.presentation import build_context
from tests.e2e.test_commitment import Committing
from tests.e2e.test_completeness import CT, Counting, Failing, FourOrEight, send_all
from tests.e2e.wire import Raw, bare, image, resident, store
from tests.unit.test_storage import claim, instances, make_ready, opened
from tests.unit.test_waits import expire

from dicomnode.errors import OutOfResources
from dicomnode.lib.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST, Commitment
from dicomnode.lib.dicom import digest, encode
from dicomnode.lib.dimse import Address, _plain, ask_commitment
from dicomnode.lib.requestor import Requestor, _request, _uid, encode_command
from dicomnode.lib.tls import TLS
from dicomnode.lib.transcode import IMPLICIT
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import State
from dicomnode.storage.outbox import Delivery
from dicomnode.storage.store import Storage
from dicomnode.testing import StoringNode, address_of, make_series, running_node, wait_for_cases

VERIFICATION = "1.2.840.10008.1.1"


def test_a_case_is_not_deleted_after_its_sender_was_told_that_an_image_is_there() -> None:
    (image,) = instances(1)
    with opened(None) as storage:
        storage.add("P", ["ct"], image)
        contents = storage.current("P")
        assert contents is not None
        storage.add("P", ["ct"], image)
        assert not storage.expire("P", contents)
        assert expire(storage, "P")


def test_a_revision_with_other_content_leaves_the_earlier_case(tmp_path: Path) -> None:
    series = make_series(8)
    with running_node(Failing, input={"ct": FourOrEight}, root_data_directory=tmp_path) as node:
        send_all(node, series[:7])
        wait_for_cases(node, State.FAILED)

        def files() -> set[bytes]:
            return {path.read_bytes() for path in tmp_path.glob("*/*/*.dcm")}

        kept = files()
        # The first image again, changed: two contents were answered 0x0000 under one UID.
        series[0].SeriesDescription = "corrected"
        send_all(node, [series[0], series[7]])
        wait_for_cases(node, State.DONE)
        assert node.seen == [7, 8]
        assert [case.state for case in node.cases()] == [State.FAILED, State.DONE]
        # Those of a case that is done are deleted after that.
        assert node.wait(lambda: len(list(tmp_path.glob("*/*/*.dcm"))) == 7, 10)
        assert files() == kept


def test_a_case_that_holds_nothing_repeats_no_other(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
        assert claim(storage, number)
        # The node ends before the first image of the next case is there.
        storage.ledger.open_case("P", "P~2")
    with opened(tmp_path) as storage:
        contents = storage.current("P")
        assert contents is not None and storage.park("P", contents) is None


def test_messages_that_are_sent_without_a_pause_do_not_pile_up() -> None:
    command = encode_command(
        [
            (0x0002, _uid(VERIFICATION)),
            (0x0100, b"\x30\0"),
            (0x0110, b"\1\0"),
            (0x0800, b"\1\1"),
        ]
    )
    value = struct.pack(">IBB", len(command) + 2, 1, 3) + command
    echoes = (struct.pack(">BBI", 4, 0, len(value)) + value) * 1000
    context = build_context(VERIFICATION, "1.2.840.10008.1.2")
    context.context_id = 1
    over = threading.Event()
    with running_node(Counting) as node:
        with closing(socket.create_connection(("127.0.0.1", node.port))) as peer:
            peer.sendall(_request("NODE", "FLOOD", [context], ""))
            assert peer.recv(1 << 16)[0] == 2
            peer.settimeout(0.5)

            def flood() -> None:
                while not over.is_set():
                    try:
                        peer.sendall(echoes)
                    except OSError:
                        return

            thread = threading.Thread(target=flood)
            thread.start()
            answers, most = 0, 0
            assert node._server is not None and node._server._server is not None
            try:
                while answers < 50_000:
                    answers += len(peer.recv(1 << 16))
                    for one in node._server._server.active_associations:
                        most = max(most, one.dimse.msg_queue.qsize())
            finally:
                over.set()
                thread.join()
        assert most < 50


def test_a_case_is_looked_at_though_its_interruption_cannot_be_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    added, closed = threading.Event(), threading.Event()
    add = Storage.add

    def slow(*arguments: object) -> int:
        number = add(*arguments)  # type: ignore[arg-type]
        added.set()
        assert closed.wait(30)
        return number

    def full(*_: object) -> None:
        raise OutOfResources("the ledger cannot be written: full")

    class One(FourOrEight):
        def validate(self) -> bool:
            return self.images == 1

    with running_node(Counting, input={"ct": One}) as node:
        monkeypatch.setattr(Storage, "add", slow)
        monkeypatch.setattr(Storage, "interrupt", full)
        thread = threading.Thread(target=_send_and_leave, args=(node.port, added))
        thread.start()
        assert added.wait(30)
        thread.join()
        server = node._server
        assert server is not None
        # As when the connection closes while the image is on its way.
        for association in list(server._visits):
            server._end(association)
        closed.set()
        wait_for_cases(node, State.DONE)
        assert "what may be sent again is not remembered" in caplog.text


def _send_and_leave(port: int, added: threading.Event) -> None:
    dataset = make_series(1)[0]
    association = AE(ae_title="LEAVER").associate(
        "127.0.0.1",
        port,
        [build_context(dataset.SOPClassUID, "1.2.840.10008.1.2.1")],
        ae_title="NODE",
    )
    assert association.is_established
    sending = threading.Thread(target=association.send_c_store, args=(dataset,), daemon=True)
    sending.start()
    assert added.wait(30)
    association.abort()


def test_a_sender_that_does_not_take_its_report_keeps_no_other_from_one(tmp_path: Path) -> None:
    with running_node(Counting, root_data_directory=tmp_path) as node:
        asked = Commitment(generate_uid(), {generate_uid(): CT})
        silent = Requestor(
            "it", ("127.0.0.1", node.port), "NODE", "SILENT", [(PUSH_MODEL, IMPLICIT)]
        )
        answer = silent.action(
            1, PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST, _plain(asked.to_dataset(), IMPLICIT)
        )
        assert answer.number(0x0900) == 0
        assert silent.has_message(20)
        # Its report is not answered, which the node waits for.
        start = time.monotonic()
        report = ask_commitment(address_of(node), asked, "OTHER", seconds=20)
        assert report is not None and time.monotonic() - start < Limits().stall_seconds / 2
        silent.abort()


def test_a_validate_that_hangs_at_a_start_keeps_neither_the_node_nor_other_cases(
    tmp_path: Path,
) -> None:
    over, hangs = threading.Event(), threading.Event()

    class Picky(FourOrEight):
        def validate(self) -> bool:
            if not hangs.is_set():
                return False
            if any(one.PatientID == "HANGS" for one in self.data.values()):
                over.wait(60)
            return True

    names = ["HANGS", "A", "B", "C"]
    with running_node(Counting, input={"ct": Picky}, root_data_directory=tmp_path) as node:
        for name in names:
            send_all(node, make_series(1, patient_id=name))
    hangs.set()
    with running_node(Counting, input={"ct": Picky}, root_data_directory=tmp_path) as node:
        try:
            wait_for_cases(node, State.DONE, 3)
            assert node.cases()[0].state is State.RECEIVING
        finally:
            over.set()


def test_an_endpoint_of_which_the_certificate_is_gone_keeps_no_other_from_its_results(
    tmp_path: Path,
) -> None:
    subprocess.run(
        ["/usr/bin/openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate"), "-subj", "/CN=us"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = TLS(tmp_path / "certificate", tmp_path / "key")
    with running_node(StoringNode) as other:
        endpoints = [Address("127.0.0.1", 9, "GONE", tls), address_of(other)]
        with running_node(
            Committing, commit=False, endpoints=endpoints, root_data_directory=tmp_path / "root"
        ) as node:
            # As while it is replaced by a new one.
            (tmp_path / "certificate").unlink()
            send_all(node, make_series(2))
            storage = node._storage
            assert storage is not None
            assert node.wait(
                lambda: (
                    "cannot be used" in str(storage.outbox.outages())
                    and any(one.state is Delivery.SENT for one in storage.outbox.exports())
                ),
                20,
            )
            assert len(other.received) == 2
            assert node.cases()[0].state is State.EXPORTING


class Never(AbstractInput):
    def validate(self) -> bool:
        return False


class Keeping(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Never}


@pytest.mark.parametrize("durability", ["power", "process"])
def test_images_that_come_at_once_keep_their_own_bytes_and_digests(
    tmp_path: Path, durability: str
) -> None:
    # Digests of several are made together, and memory of one is that of the next: sizes around those at which
    # another way is taken, the large ones before the small.
    sizes = [
        (600, 500),
        (16, 16),
        (187, 175),
        (180, 181),
        (256, 512),
        (3, 5),
        (512, 512),
        (120, 90),
    ]

    def send_some(number: int) -> dict[str, bytes]:
        chance, sent = random.Random(number), {}
        with Raw(node).open() as peer:
            for rows, columns in chance.sample(sizes * 2, 12):
                (one,) = make_series(1, rows, columns, patient_id=f"P{number % 3}")
                one.PixelData = chance.randbytes(len(one.PixelData))
                sent[str(one.SOPInstanceUID)] = data = bare(encode(one)[0])
                peer.send(store(str(one.SOPInstanceUID), data))
                assert peer.status() == 0
            peer.release()
        return sent

    with (
        running_node(Keeping, root_data_directory=tmp_path, durability=durability) as node,
        ThreadPoolExecutor(8) as pool,
    ):
        sent = {uid: data for some in pool.map(send_some, range(8)) for uid, data in some.items()}
        assert node._storage is not None
        ledger, hashed = node._storage.ledger, hashlib.sha256 if durability == "power" else None
        rows = [(case.folder, row) for case in node.cases() for row in ledger.instances(case.id)]
    assert {row.uid for _, row in rows} == set(sent) and len(sent) == 96
    for folder, row in rows:
        path = tmp_path / folder / row.input / row.file
        assert bare(path.read_bytes()) == sent[row.uid]
        assert row.digest == digest(sent[row.uid], 32 if hashed else 16)
        if hashed is not None:
            assert row.digest == hashed(sent[row.uid]).digest()


def test_images_that_are_refused_take_no_memory_however_fast_they_come(tmp_path: Path) -> None:
    # Not large enough for the disk, with another UID than the request tells: read whole, and kept by nobody.
    refused = store("1.2.3.4", image(rows=1390, columns=1390)[1])
    assert 3_500_000 < len(refused) < 4 << 20

    def flood(_: int) -> set[int]:
        with Raw(node).open() as peer:
            statuses = set()
            for _ in range(40):
                for _ in range(3):
                    peer.send(refused)
                statuses |= {peer.status() for _ in range(3)}
            peer.release()
        return statuses

    with running_node(Keeping, root_data_directory=tmp_path) as node:
        before = resident()
        with ThreadPoolExecutor(6) as pool:
            assert set().union(*pool.map(flood, range(6))) == {0xA900}
        # Six of each association that arrive, what waits for its digest, and what rests.
        assert resident() - before < 160 << 20
