"""N1 to N20 of the fault model: what peers do to an association, and what the node does then.

Each test ends with a node that serves others, and that holds no thread, descriptor or memory of the
peer; nothing is printed about it but lines of the log.
"""

import contextlib
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import AllTransferSyntaxes
from pynetdicom.pdu import A_ASSOCIATE_AC
from tests.e2e import wire
from tests.e2e.wire import Raw, pdu, serves, unharmed, value

from dicomnode.server.agreements import Requests
from dicomnode.server.connection import Connection
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, running_node, wait_for_cases

HASTY = {"idle_seconds": 1.5, "stall_seconds": 1.0}


class Never(AbstractInput):
    required_values = {"Modality": "CT"}

    def validate(self) -> bool:
        return False


class Node(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Never}


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What pytest keeps of its log would keep the connection of an exception open.
    monkeypatch.setattr(logging.getLogger("pynetdicom"), "propagate", False)
    yield
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "Exception" not in said.err, said.err
    assert "Traceback" not in said.out, said.out


@contextmanager
def node_of(memory: int = 48 << 20, **settings: Any) -> Iterator[Node]:
    """A node that has to be as before at the end."""
    with running_node(Node, **settings) as node, unharmed(node, memory):
        yield node


def stored(node: AbstractPipeline, identifier: str) -> int:
    assert node._storage is not None
    cases = [case for case in node.cases() if case.identifier == identifier]
    return sum(node._storage.ledger.counts(case.id).get("ct", (0, 0))[0] for case in cases)


def test_n1_peers_that_begin_a_pdu_and_say_no_more_are_dropped() -> None:
    with node_of(limits=Limits(associations=4, **HASTY)) as node:
        slow = [Raw(node) for _ in range(36)]
        for one in slow:
            one.send(b"\x01")
        serves(node)
        start = time.monotonic()
        for one in slow:
            assert one.receive()[0] in (0, wire.ABORT)
        assert time.monotonic() - start < 15
        for one in slow:
            one.socket.close()


def test_n2_a_stall_in_the_middle_of_a_pdu_ends_the_association() -> None:
    uid, data = wire.image()
    whole = wire.store(uid, data)
    with node_of(limits=Limits(bytes_per_second=1000, **HASTY)) as node:
        with ExitStack() as stack:
            peers = []
            for length in (1, 5, 20, 150, len(whole) - 1):
                peers.append(stack.enter_context(Raw(node).open()))
                peers[-1].send(whole[:length])
            serves(node)
            start = time.monotonic()
            for peer in peers:
                assert [one[0] for one in peer.until_the_end()] in ([wire.ABORT], [])
            assert time.monotonic() - start < 15
        assert stored(node, "WIRE") == 0


def test_n2_a_byte_now_and_then_does_not_keep_an_association_open() -> None:
    uid, data = wire.image()
    with node_of(limits=Limits(bytes_per_second=1000, **HASTY)) as node, Raw(node).open() as peer:
        start = time.monotonic()
        peer.socket.settimeout(0.1)
        for byte in wire.store(uid, data):
            peer.send(bytes([byte]))
            try:
                if peer.socket.recv(100) in (b"", pdu(wire.ABORT, bytes(4))):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
            break
        assert time.monotonic() - start < 15


def test_n3_connections_that_say_nothing_count_as_no_association_and_end() -> None:
    with node_of(limits=Limits(associations=2, **HASTY)) as node:
        idle = [Raw(node) for _ in range(60)]
        serves(node)
        for one in idle:
            assert one.receive()[0] in (0, wire.ABORT)
            one.socket.close()


@pytest.mark.parametrize("kind", [0x01, 0x02, 0x04, 0x07])
def test_n4_a_pdu_of_4_gib_before_an_association_takes_no_memory(kind: int) -> None:
    with node_of(16 << 20, limits=Limits(**HASTY)) as node, Raw(node) as peer:
        sent = 0
        peer.send(pdu(kind, b"", 0xFFFF_FFFF))
        while sent < 64 << 20 and peer.send(bytes(1 << 20)):
            sent += 1 << 20
        # What the kernel holds of a connection counts in.
        assert sent <= 16 << 20


def test_n4_a_pdu_of_4_gib_in_an_association_aborts_it() -> None:
    with node_of(16 << 20) as node:
        for kind in (wire.DATA, wire.RELEASE, wire.ABORT, 0x01):
            with Raw(node).open() as peer:
                peer.send(pdu(kind, bytes(100), 0xFFFF_FFFF))
                assert [one[0] for one in peer.until_the_end()] in ([wire.ABORT], [])


def is_hung_up_on(peer: Raw, part: bytes) -> bool:
    """Whether a peer that sends this without end cannot go on soon."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not peer.send(part):
            return True
    return False


@pytest.mark.parametrize("in_memory", [True, False])
def test_n5_an_image_without_end_is_aborted_and_nothing_is_left_of_it(
    in_memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = None if in_memory else tmp_path
    limits = Limits(instance_bytes=16 << 20, pdu_bytes=1 << 20)
    part = pdu(wire.DATA, value(3, 0, bytes(500_000)))
    with (
        node_of(64 << 20, root_data_directory=root, limits=limits) as node,
        Raw(node).open() as peer,
        caplog.at_level(logging.INFO, "dicomnode"),
    ):
        peer.send(pdu(wire.DATA, value(3, 3, wire.store_command())))
        assert is_hung_up_on(peer, part)
        assert node.wait(lambda: "a dataset of more than 16777216 bytes" in caplog.text, 10)
        if not in_memory:
            assert node.wait(lambda: not _open_files(tmp_path), 10)
            assert not list((tmp_path / ".dicomnode" / "incoming").iterdir())


def _open_files(folder: Path) -> list[int]:
    """Files without a name that this process has open below a folder, and how large they are."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = str(link.readlink())
            if name.startswith(f"{folder}/") and name.endswith("(deleted)"):
                found[link.name] = link.stat().st_size
    return list(found.values())


def test_n5_a_command_without_end_is_aborted() -> None:
    part = pdu(wire.DATA, value(1, 1, bytes(16_000)))
    with node_of(16 << 20) as node, Raw(node).open() as peer:
        assert is_hung_up_on(peer, part)


def test_n6_requests_whose_answers_are_not_read_are_not_collected() -> None:
    uid, data = wire.image(rows=512, columns=512)
    with node_of(limits=Limits(**HASTY)) as node, Raw(node, seconds=5.0).open() as peer:
        for _ in range(400):
            if not peer.send(wire.store(uid, data)):
                break
        serves(node)
        assert stored(node, "WIRE") <= 1


def test_n6_echoes_whose_answers_are_not_read_are_not_collected() -> None:
    many = pdu(wire.DATA, value(1, 3, wire.echo_command())) * 1000
    with (
        node_of(24 << 20, limits=Limits(**HASTY)) as node,
        Raw(node, seconds=5.0).open() as peer,
    ):
        sender = threading.Thread(target=lambda: all(peer.send(many) for _ in range(200)))
        sender.start()
        most = 0
        provider = next(iter(node._server._visits)).provider  # type: ignore[union-attr,attr-defined]
        end = time.monotonic() + 4
        while time.monotonic() < end:
            most = max(most, provider._association.dimse.msg_queue.qsize())
        assert most < 100
        serves(node)
        peer.socket.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_n9_a_title_has_to_come_from_its_own_addresses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    allowed = {"FRIEND": [], "SCANNER": ["127.0.0.2"]}
    with (
        node_of(require_calling_aet=allowed) as node,
        caplog.at_level(logging.INFO, "dicomnode"),
    ):
        for calling, source, answer in (
            ("FOE", "127.0.0.1", wire.REJECT),
            ("SCANNER", "127.0.0.1", wire.REJECT),
            ("SCANNER", "127.0.0.2", wire.ACCEPT),
            ("FRIEND", "127.0.0.2", wire.ACCEPT),
        ):
            with Raw(node, source) as peer:
                peer.send(wire.request(calling=calling))
                kind, body = peer.receive()
                assert kind == answer, (calling, source)
                if kind == wire.REJECT:
                    # Permanent, by the service user: calling AE title not recognised.
                    assert body == b"\0\x01\x01\x03"
                else:
                    peer.release()
        assert caplog.text.count("rejected") == 2


def test_n9_addresses_that_are_not_allowed_are_hung_up_on() -> None:
    with running_node(Node, allowed_networks=["127.0.0.2/32"]) as node:
        with Raw(node) as stranger:
            stranger.send(wire.request())
            assert stranger.receive()[0] == 0
        with Raw(node, "127.0.0.2").open() as peer:
            peer.release()


def test_n10_another_called_title_is_rejected_for_good() -> None:
    with node_of() as node, Raw(node) as peer:
        peer.send(wire.request(called="OTHER"))
        assert peer.receive() == (wire.REJECT, b"\0\x01\x01\x07")


@pytest.mark.parametrize(
    "title",
    [
        b"../../../etc",
        b"/",
        b"..",
        b"A\0B",
        b"<script>x",
        b"\xff" * 16,
        b"node",
        b"x\ny\x1b[31m",
        b"",
    ],
)
def test_n11_titles_are_never_a_path_a_line_or_markup(
    title: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    with node_of(root_data_directory=root, require_called_aet=False) as node:
        for called, calling in ((b"NODE", title), (title, b"RAW")):
            with Raw(node) as peer:
                peer.send(wire.request(called=called, calling=calling))
                if peer.receive()[0] == wire.ACCEPT:
                    uid, data = wire.image("PATIENT")
                    peer.send(wire.store(uid, data))
                    assert peer.status() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    said = capfd.readouterr().out
    assert "\x1b" not in said and "\xff" not in said
    assert all(line[:2] == "20" for line in said.splitlines()), said


def ask(node: Node) -> tuple[int, bytes, Raw]:
    """What comes of a request, and the connection."""
    peer = Raw(node, seconds=15)
    peer.send(wire.request())
    return (*peer.receive(), peer)


def test_n12_a_flood_is_answered_and_those_that_were_accepted_finish() -> None:
    with node_of(96 << 20, limits=Limits(associations=20)) as node:
        uid, data = wire.image()
        with Raw(node).open() as held:
            with ThreadPoolExecutor(50) as pool:
                answers = list(pool.map(lambda _: ask(node), range(200)))
            held.send(wire.store(uid, data))
            assert held.status() == 0
            accepted = [k for k, (kind, _, _) in enumerate(answers) if kind == wire.ACCEPT]
            rejected = [body for kind, body, _ in answers if kind == wire.REJECT]
            for k in accepted:
                peer = answers[k][2]
                peer.send(wire.store(uid, data))
                assert peer.status() == 0
            assert len(accepted) == 19
            # Transient, by the service provider: local limit exceeded.
            assert set(rejected) == {b"\0\x02\x03\x02"}
            assert len(accepted) + len(rejected) == 200
            for *_, one in answers:
                one.socket.close()


def test_n12_one_address_does_not_keep_all_others_out(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(associations=10, associations_per_address=3)
    with node_of(96 << 20, limits=limits) as node, caplog.at_level(logging.INFO, "dicomnode"):
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: ask(node), range(20)))
        accepted = [peer for kind, _, peer in answers if kind == wire.ACCEPT]
        rejected = [body for kind, body, _ in answers if kind == wire.REJECT]
        assert (len(accepted), len(rejected)) == (3, 17)
        # Transient, as where there are too many in all.
        assert set(rejected) == {b"\0\x02\x03\x02"}
        assert caplog.text.count("rejected: too many associations of this address") == 17
        with Raw(node, "127.0.0.2").open() as other:
            other.release()
        # There is room again as soon as one of them has ended.
        accepted[0].release()
        accepted[0].until_the_end()
        with Raw(node).open() as again:
            again.release()
        for *_, one in answers:
            one.socket.close()
    assert Limits().associations_per_address == Limits().associations // 2


def test_n13_associations_with_all_contexts_are_made_quickly() -> None:
    storage = [str(one.abstract_syntax) for one in Node.supported_contexts][:127]
    syntaxes = [str(one) for one in AllTransferSyntaxes][:45]
    contexts = [(1, wire.VERIFICATION, (wire.IMPLICIT,))]
    contexts += [(2 * k + 3, one, syntaxes) for k, one in enumerate(storage)]
    asked = wire.request(contexts=contexts)
    with node_of() as node:
        start = time.monotonic()
        for _ in range(20):
            with Raw(node).open(asked) as peer:
                peer.release()
        took = (time.monotonic() - start) / 20
        print(f"{len(contexts)} contexts of 45 transfer syntaxes: {took * 1000:.0f} ms")
        assert took < 1.0


def test_n14_a_context_that_was_not_accepted_aborts_the_association(
    caplog: pytest.LogCaptureFixture,
) -> None:
    uid, data = wire.image()
    with node_of() as node, caplog.at_level(logging.INFO, "dicomnode"):
        for context in (0, 2, 5, 255):
            with Raw(node).open() as peer:
                peer.send(wire.store(uid, data, context=context))
                assert [one[0] for one in peer.until_the_end()] in ([wire.ABORT], [])
        assert caplog.text.count("which was not accepted") == 4
        # A context of the request within the dataset of another one.
        with Raw(node).open() as peer:
            peer.send(pdu(wire.DATA, value(3, 3, wire.store_command(uid))))
            peer.send(pdu(wire.DATA, value(1, 2, data)))
            assert [one[0] for one in peer.until_the_end()] in ([wire.ABORT], [])


def test_n15_a_sop_class_that_is_not_of_its_context_is_0122() -> None:
    uid, data = wire.image()
    with node_of() as node, Raw(node).open() as peer:
        for sop_class in (wire.MR, wire.VERIFICATION, "1.2.3"):
            peer.send(wire.store(uid, data, sop_class))
            assert peer.status() == 0x0122
        # Over the context of C-ECHO, where nothing can be stored.
        peer.send(wire.store(uid, data, context=1))
        assert peer.status() == 0x0122
        peer.send(wire.store(uid, data))
        assert peer.status() == 0


GARBAGE = {
    "an empty fragment": pdu(wire.DATA, value(1, 0, b"")),
    "an empty command": pdu(wire.DATA, value(1, 3, b"")),
    "no fragment": pdu(wire.DATA, b""),
    "half a fragment": pdu(wire.DATA, b"\0\0\0"),
    "a fragment without its header": pdu(wire.DATA, struct.pack(">IB", 1, 1)),
    "a fragment longer than its PDU": pdu(wire.DATA, value(1, 3, b"abc", 1000)),
    "a command of noise": pdu(wire.DATA, value(1, 3, random.Random(1).randbytes(200))),
    "a command of zeros": pdu(wire.DATA, value(1, 3, bytes(200))),
    "an unknown command": pdu(
        wire.DATA, value(1, 3, wire.command({0x100: b"\x77\x77", 0x110: b"\1\0", 0x800: b"\1\1"}))
    ),
    "a response to nothing": pdu(
        wire.DATA,
        value(1, 3, wire.command({0x100: b"\x30\x80", 0x120: b"\1\0", 0x800: b"\1\1"})),
    ),
    "a command without its number": pdu(
        wire.DATA, value(1, 3, wire.command({0x100: b"\x30\0", 0x800: b"\1\1"}))
    ),
    "a command with short values": pdu(
        wire.DATA, value(1, 3, wire.command({0x100: b"\x30", 0x110: b"", 0x800: b"\1"}))
    ),
    "a find": pdu(
        wire.DATA,
        value(1, 3, wire.command({0x2: b"1.2\0", 0x100: b"\x20\0", 0x110: b"\1\0", 0x800: b"\0\0"}))
        + value(1, 2, b"noise"),
    ),
    "an echo with a dataset": pdu(
        wire.DATA,
        value(1, 3, wire.command({0x100: b"\x30\0", 0x110: b"\1\0", 0x800: b"\0\0"}))
        + value(1, 2, bytes(100)),
    ),
    "a command that is a UID of noise": pdu(
        wire.DATA,
        value(
            1,
            3,
            wire.command({0x2: b"\xff" * 300, 0x100: b"\x30\0", 0x110: b"\1\0", 0x800: b"\1\1"}),
        ),
    ),
    "a cancel": pdu(
        wire.DATA, value(1, 3, wire.command({0x100: b"\xff\x0f", 0x120: b"\1\0", 0x800: b"\1\1"}))
    ),
    "a dataset without a command": pdu(wire.DATA, value(3, 2, bytes(100))),
    "a command within a dataset": pdu(
        wire.DATA, value(3, 3, wire.store_command()) + value(3, 3, wire.echo_command())
    ),
    "an unknown PDU": pdu(0x99, bytes(10)),
    "a PDU of type 0": pdu(0, bytes(10)),
    "a second request": wire.request(),
    "an answer to a request": pdu(0x02, wire.request()[6:]),
    "a rejection": pdu(0x03, bytes(4)),
    "a release response": pdu(0x06, bytes(4)),
    "a short release": pdu(0x05, b""),
    "a short abort": pdu(0x07, b""),
    "noise": random.Random(2).randbytes(1000),
}


def test_n16_garbage_in_an_association_aborts_it_and_nothing_else() -> None:
    with node_of(limits=Limits(**HASTY)) as node:
        peers = {name: Raw(node).open() for name in GARBAGE}
        for name, peer in peers.items():
            peer.send(GARBAGE[name])
        serves(node)
        for name, peer in peers.items():
            # A response may come before, where the request could be understood.
            found = [one[0] for one in peer.until_the_end()]
            assert set(found) <= {wire.ABORT, wire.DATA, wire.RELEASED}, name
            peer.socket.close()


NO_REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    pdu(0x01, b""),
    pdu(0x01, bytes(68)),
    pdu(0x01, bytes(20)),
    wire.request()[:90] + b"\xff\xff" + wire.request()[92:],
    wire.request(contexts=[]),
    wire.request(contexts=[(1, "x" * 200, ("y" * 200,))]),
    wire.request(contexts=[(1, "", ())]),
    wire.request(contexts=[(1, wire.CT, (wire.EXPLICIT,))] * 300),
    wire.request(contexts=[(2, wire.CT, (wire.EXPLICIT,)), (0, wire.CT, ("1.2",))]),
    wire.request(largest=1) + pdu(wire.DATA, value(1, 3, wire.echo_command())),
    wire.request(largest=130) + pdu(wire.DATA, value(1, 3, wire.echo_command())),
    wire.request(more=b"\x54\0\0\x04\0\xff\0\0"),
    wire.request(more=b"\x58\0\0\x06\xff\1\xff\xff\0\0"),
    wire.request(more=b"\x56\0\0\x02\xff\xff"),
    wire.request(more=b"\x53\0\0\x04\0\0\0\0" * 50),
    wire.request(more=b"\x99\0\0\x04abcd"),
    wire.pdu(wire.DATA, value(1, 3, wire.echo_command())),
    wire.pdu(wire.RELEASE, bytes(4)),
    wire.pdu(wire.ABORT, bytes(4)),
    wire.request() * 2,
]


@pytest.mark.parametrize("lacking", ["AcceptorThread", "servant"])
def test_n12_a_connection_for_which_there_is_no_thread_leaves_nothing(
    lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_first = lacking == "AcceptorThread"
    really = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == lacking:
            raise RuntimeError("can't start new thread")
        really(thread)

    with node_of() as node:
        with monkeypatch.context() as short:
            short.setattr(threading.Thread, "start", start)
            for _ in range(5):
                with Raw(node) as peer:
                    peer.send(wire.request())
                    if not is_first:
                        assert peer.receive()[0] == wire.ACCEPT
                        # Only what is no image needs another thread.
                        peer.send(wire.store(*wire.image()))
                        assert peer.status() == 0
                        peer.send(pdu(wire.DATA, value(1, 3, wire.echo_command())))
                    assert peer.until_the_end() == []
        serves(node)
        server = node._server
        assert server is not None
        # That of the last friend ends in a moment.
        assert node.wait(lambda: not server._visits, 5)
    assert ("what came cannot be handled (RuntimeError)" in caplog.text) != is_first


@pytest.mark.parametrize("asks", [False, True])
def test_an_association_has_a_second_thread_only_where_it_asks_for_more(asks: bool) -> None:
    def names() -> list[str]:
        found = (one.name for one in threading.enumerate())
        return [name for name in found if name in ("AcceptorThread", "servant")]

    with node_of() as node:
        assert node.wait(lambda: not names(), 10)
        with Raw(node).open() as peer:
            for k in range(3):
                peer.send(wire.store(*wire.image()))
                assert peer.status() == 0
                if asks:
                    peer.send(pdu(wire.DATA, value(1, 3, wire.echo_command(k + 1))))
                    assert peer.status() == 0
            assert sorted(names()) == ["AcceptorThread", "servant"][: 1 + asks]
            peer.release()
        assert node.wait(lambda: not names(), 10)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("how", ["abort", "vanish", "release"])
def test_how_an_association_ends_is_told_once(
    how: str, asks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with node_of() as node:
        caplog.clear()
        with Raw(node).open() as peer:
            peer.send(wire.store(*wire.image()))
            assert peer.status() == 0
            if asks:
                peer.send(pdu(wire.DATA, value(1, 3, wire.echo_command())))
                assert peer.status() == 0
            if how == "abort":
                peer.send(pdu(wire.ABORT, bytes(4)))
            elif how == "release":
                peer.release()
        server = node._server
        assert server is not None
        assert node.wait(lambda: "1 stored, 0 refused" in caplog.text, 10)
        aborts = 0 if how == "release" else 1
        assert node.wait(lambda: caplog.text.count("aborted") >= aborts, 10)
        time.sleep(0.05)
        assert caplog.text.count("1 stored, 0 refused") == 1
        assert caplog.text.count("aborted") == aborts


def test_n16_garbage_in_place_of_a_request_ends_the_connection() -> None:
    with node_of(limits=Limits(**HASTY)) as node:
        peers = [Raw(node) for _ in NO_REQUESTS]
        for peer, data in zip(peers, NO_REQUESTS, strict=True):
            peer.send(data)
        serves(node)
        for peer, data in zip(peers, NO_REQUESTS, strict=True):
            found = [one[0] for one in peer.until_the_end()]
            assert set(found) <= {wire.ACCEPT, wire.REJECT, wire.ABORT, wire.DATA}, data
            peer.socket.close()


SHARED = {
    # The server's, which it has for all of them.
    *("_ae", "_server", "_service", "_handlers", "requests", "keeping", "limits"),
    # What is replaced where it changes, never changed itself.
    *("agreed", "on_end", "on_trouble", "_last", "_common_ext"),
    # What is not changed once there is a connection.
    *("_contexts", "_user_info", "address_info"),
    # Of a thread that is never started: that of the association does its work.
    *("_invoke_excepthook", "_kwargs", "_started", "_stderr", "_target"),
}


def known(node: AbstractPipeline) -> Requests:
    assert node._server is not None
    assert node._server._server is not None
    return node._server._server.requests


def test_n16_a_request_that_is_known_again_is_that_of_its_own_sender(
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = [(2 * k + 1, wire.CT, (wire.EXPLICIT,) * 40) for k in range(100)]
    with node_of() as node, caplog.at_level(logging.INFO, "dicomnode"):
        everyone = ["ONE", "TWO", "ONE", "TWO", "ONE"]
        for calling in everyone:
            with Raw(node).open(wire.request(calling=calling)) as peer:
                peer.release()
        before = list(known(node)._known)
        assert before[-1] == wire.request(calling="ONE")
        # What is large is decoded each time, and pushes nothing out.
        for _ in range(2):
            with Raw(node).open(wire.request(contexts=many)) as peer:
                peer.release()
        assert list(known(node)._known) == before
    opened = [one.split("'")[1] for one in caplog.messages if one.endswith(" opened")]
    # The friend is that of `unharmed`.
    assert [one for one in opened if one not in ("FRIEND", "RAW")] == everyone


def test_n16_strangers_fill_no_memory_with_requests_that_are_known_again() -> None:
    with node_of() as node:
        for k in range(60):
            contexts = [(1, wire.CT, [f"1.2.{k}.{number}" for number in range(1600)])]
            with Raw(node).open(wire.request(contexts=contexts)) as peer:
                peer.release()
        assert 1 < len(known(node)._known) < 30
        assert sum(map(len, known(node)._known)) <= 1 << 19


def test_the_same_request_has_the_same_answer_and_each_association_its_images() -> None:
    role = b"\x54\0\0\x1e" + struct.pack(">H", 26) + wire.CT.encode().ljust(26, b"\0") + b"\1\1"
    contexts = [
        (1, wire.VERIFICATION, (wire.IMPLICIT,)),
        (3, wire.CT, ("1.2.840.10008.1.2.4.70", wire.EXPLICIT, wire.IMPLICIT)),
        (5, "1.2.3.4", (wire.IMPLICIT,)),
        (7, wire.MR, ("1.2.3.5",)),
    ]
    asked = wire.request(contexts=contexts, more=role)

    def one(number: int) -> bytes:
        with Raw(node) as peer:
            peer.send(asked)
            kind, answer = peer.receive()
            assert kind == wire.ACCEPT
            # The first of ours that the sender has, too.
            peer.send(wire.pdu(wire.DATA, value(1, 3, wire.echo_command())))
            assert peer.status() == 0
            peer.send(wire.store(*wire.image(f"P{number}")))
            assert peer.status() == 0
            peer.release()
        return answer

    with node_of() as node:
        with ThreadPoolExecutor(8) as pool:
            answers = set(pool.map(one, range(24)))
        assert len(answers) == 1
        accepted = A_ASSOCIATE_AC()
        accepted.decode(pdu(wire.ACCEPT, answers.pop()))
        results = {cx.presentation_context_id: cx.result for cx in accepted.presentation_context}
        assert results == {1: 0, 3: 0, 5: 3, 7: 4}
        assert accepted.presentation_context[1].transfer_syntax == wire.EXPLICIT
        assert [stored(node, f"P{number}") for number in range(24)] == [1] * 24


def test_nothing_of_one_negotiation_is_in_the_answer_to_another() -> None:
    push = "1.2.840.10008.1.20.1"
    role = b"\x54\0\0\x18" + struct.pack(">H", 20) + push.encode() + b"\1\1"
    contexts = [(1, push, (wire.IMPLICIT,))]

    def roles(asked: bytes) -> int:
        with Raw(node) as peer:
            peer.send(asked)
            kind, answer = peer.receive()
            assert kind == wire.ACCEPT
            peer.release()
        return answer.count(role[4:24])

    with node_of() as node:
        found = [roles(wire.request(contexts=contexts, more=more)) for more in (role, b"") * 3]
    assert found == [1, 0] * 3


def test_a_place_is_free_as_soon_as_a_release_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Connection.send

    def slow(self: Connection, data: bytes) -> None:
        real(self, data)
        if data[0] == wire.RELEASED:
            time.sleep(0.05)

    monkeypatch.setattr(Connection, "send", slow)
    with node_of(limits=Limits(associations=1)) as node:
        for _ in range(4):
            with Raw(node).open() as peer:
                peer.release()


def test_associations_share_nothing_that_one_of_them_changes() -> None:
    with node_of() as node:
        assert node._server is not None and node._server._server is not None
        pattern = node._server._server.pattern
        first, second = pattern.again(), pattern.again()
        try:
            for one, other in (
                (vars(first), vars(second)),
                (vars(first.provider), vars(second.provider)),
                (vars(first.requestor), vars(second.requestor)),
                (vars(first.acceptor), vars(second.acceptor)),
            ):
                shared = {
                    name
                    for name, value in one.items()
                    if value is other[name]
                    and not isinstance(value, str | int | float | bool | frozenset | None)
                    and value != ()
                }
                assert shared <= SHARED, shared - SHARED
        finally:
            for made in (first, second):
                made.provider.wake.close()


def test_pynetdicoms_own_log_tells_of_each_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("pynetdicom"), "propagate", True)
    caplog.set_level(logging.DEBUG, "pynetdicom")
    with running_node(Node) as node:
        for _ in range(3):
            with Raw(node).open() as peer:
                peer.release()
        assert node.wait(lambda: not wire._connections(node), 10)
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
    # The same of each, also of those that are known again.
    for words in ("Request Parameters", "Accept Parameters", "Context ID:        3 (Accepted)"):
        told = sum(words in one for one in caplog.messages)
        assert told and told % 3 == 0, (words, told)


def test_a_request_that_is_known_again_is_let_in_only_where_it_may_now() -> None:
    with node_of(limits=Limits(associations=2)) as node:
        for _ in range(3):
            with ExitStack() as stack:
                held = [stack.enter_context(Raw(node).open()) for _ in range(2)]
                with Raw(node) as further:
                    further.send(wire.request())
                    assert further.receive()[0] == wire.REJECT
                for peer in held:
                    peer.release()
            assert node.wait(lambda: not wire._connections(node), 10)
    with running_node(Node, require_called_aet=True) as node:
        for _ in range(3):
            for called, kind in (("NODE", wire.ACCEPT), ("OTHER", wire.REJECT)):
                with Raw(node) as peer:
                    peer.send(wire.request(called=called))
                    assert peer.receive()[0] == kind
        assert [one.agreement is not None for one in known(node)._known.values()] == [True, False]


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (
            b"\x16\x03\x01\0\xfa\x01" + bytes(250),
            "begins with a TLS handshake, and this port takes no TLS",
        ),
        (b"GET / HTTP/1.1\r\n\r\n", "it speaks HTTP"),
        (b"\xff" * 6, "it begins with ff ff ff ff ff ff, which no PDU of DICOM does"),
        (pdu(0x01, bytes(20)), "a request for an association of 26 bytes"),
        (pdu(0x01, b"x", 1 << 21), "a PDU of 2097152 bytes before there is an association"),
        (pdu(wire.RELEASE, bytes(4)), "its first PDU, of type 0x05, is no request"),
        (wire.request(calling=""), "its PDU of type 0x01 cannot be decoded"),
        (pdu(wire.DATA, b"\0\0\0\1\xff\xff"), "its PDU of type 0x04 cannot be decoded"),
        (
            wire.request(contexts=[(1, wire.CT, [wire.EXPLICIT])] * 2),
            "presentation context 1 twice",
        ),
    ],
)
def test_n16_the_log_tells_once_what_is_no_request(
    data: bytes, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    with node_of() as node, caplog.at_level(logging.INFO, "dicomnode"):
        with Raw(node) as peer:
            peer.send(data)
            # It gets the reason to the end, not a connection that is reset.
            assert [one[0] for one in peer.until_the_end()] == [wire.ABORT]
        serves(node)
    ours = [one for one in caplog.records if one.name.startswith("dicomnode")]
    told = [one.getMessage() for one in ours if "is aborted" in one.getMessage()]
    assert len(told) == 1 and trouble in told[0] and "127.0.0.1" in told[0], told


ENDS: dict[str, Callable[[Raw], object]] = {
    "abort": lambda peer: peer.send(pdu(wire.ABORT, bytes(4))),
    "close": lambda peer: peer.socket.close(),
    "release": lambda peer: peer.send(pdu(wire.RELEASE, bytes(4))),
    "reset": lambda peer: (
        peer.socket.setsockopt(1, 13, struct.pack("ii", 1, 0)),
        peer.socket.close(),
    ),
}


class Two(AbstractInput):
    def validate(self) -> bool:
        return self.images >= 2


class Counting(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Two}

    def process(self, input_data: Any) -> None:
        self.processed = [*getattr(self, "processed", []), len(input_data["ct"])]


@pytest.mark.parametrize("size", [256, 2048])
@pytest.mark.parametrize("end", ENDS)
def test_n17_half_an_image_is_never_kept_and_the_whole_ones_are(
    end: str, size: int, tmp_path: Path
) -> None:
    whole, half = wire.image("HALF"), wire.image("HALF", size, size)
    with running_node(Counting, root_data_directory=tmp_path) as node, unharmed(node):
        with Raw(node).open() as peer:
            peer.send(wire.store(*whole))
            assert peer.status() == 0
            # Up to the last PDU but one: what comes then is not taken for pixels.
            sent = wire.store(*half)
            peer.send(sent[: -12 - (len(half[1]) % 16000 or 16000)])
            # Large ones go to the disk while they arrive.
            if size == 2048:
                assert node.wait(lambda: any(_open_files(tmp_path)), 10)
            ENDS[end](peer)
            if end == "release":
                peer.until_the_end()
        assert node.wait(lambda: not node._server._visits, 20)  # type: ignore[union-attr]
        assert stored(node, "HALF") == 1
        assert node.wait(lambda: not _open_files(tmp_path), 20)
        assert not list((tmp_path / ".dicomnode" / "incoming").iterdir())
        assert not getattr(node, "processed", [])
        # What was whole counts, and the rest may come later.
        with Raw(node).open() as peer:
            peer.send(wire.store(*half))
            assert peer.status() == 0
            peer.release()
        wait_for_cases(node, State.DONE)
        assert node.processed == [2]


def test_n18_a_peer_that_says_no_more_is_aborted_and_what_it_sent_is_processed() -> None:
    with running_node(Counting, limits=Limits(**HASTY)) as node, unharmed(node):
        with Raw(node).open() as peer:
            for one in (wire.image("QUIET"), wire.image("QUIET")):
                peer.send(wire.store(*one))
                assert peer.status() == 0
            wait_for_cases(node, State.DONE)
            assert [one[0] for one in peer.until_the_end()] == [wire.ABORT]
        assert node.processed == [2]


def test_n18_a_peer_that_sends_image_after_image_is_not_idle_however_long_it_takes() -> None:
    uid, data = wire.image()
    with node_of(limits=Limits(**HASTY)) as node, Raw(node).open() as peer:
        end = time.monotonic() + 2.5 * HASTY["idle_seconds"]
        while time.monotonic() < end:
            peer.send(wire.store(uid, data))
            assert peer.status() == 0
        peer.release()


def test_n19_fragments_of_one_byte_make_the_same_image(tmp_path: Path) -> None:
    uid, data = wire.image()
    asked = [(1, wire.VERIFICATION, (wire.IMPLICIT,))]
    asked += [(2 * k + 1, wire.CT, (wire.EXPLICIT,)) for k in range(1, 128)]
    with node_of(root_data_directory=tmp_path) as node:
        with Raw(node).open(wire.request(contexts=asked)) as peer:
            for context in (3, 5, 255):
                fragments = [
                    value(context, 1 + 2 * (k == len(wire.store_command(uid)) - 1), bytes([byte]))
                    for k, byte in enumerate(wire.store_command(uid))
                ]
                fragments += [
                    value(context, 2 * (k == len(data) - 1), bytes([byte]))
                    for k, byte in enumerate(data)
                ]
                chance = random.Random(context)
                while fragments:
                    count = chance.randrange(1, 200)
                    peer.send(pdu(wire.DATA, b"".join(fragments[:count])))
                    del fragments[:count]
                assert peer.status() == 0
            peer.release()
        (file,) = tmp_path.glob("*WIRE*/ct/*.dcm")
        assert wire.bare(file.read_bytes()) == data


def test_n19_a_million_fragments_take_no_minute() -> None:
    part = pdu(wire.DATA, value(3, 0, b"x") * 2000)
    with node_of() as node, Raw(node).open() as peer:
        peer.send(pdu(wire.DATA, value(3, 3, wire.store_command())))
        start = time.process_time()
        for _ in range(500):
            assert peer.send(part)
        peer.send(pdu(wire.DATA, value(3, 2, b"x")))
        assert peer.status() == 0xC000
        assert time.process_time() - start < 20


def test_n20_bit_flips_of_a_session_harm_nobody() -> None:
    uid, data = wire.image(rows=8, columns=8)
    session = wire.request() + pdu(wire.DATA, value(1, 3, wire.echo_command()))
    session += wire.store(uid, data) + pdu(wire.RELEASE, bytes(4))
    chance = random.Random(20)
    with node_of(limits=Limits(**HASTY)) as node:
        for k in range(150):
            flipped = bytearray(session)
            for _ in range(chance.choice([1, 1, 2, 8])):
                # Mostly where the protocol is, not the pixels.
                at = chance.randrange(chance.choice([120, 400, len(session)]))
                flipped[at] ^= 1 << chance.randrange(8)
            with Raw(node) as peer:
                peer.send(bytes(flipped))
                if k % 5 == 0:
                    peer.until_the_end()
            if k % 10 == 0:
                serves(node)
