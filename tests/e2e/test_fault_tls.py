"""N7 and N8 of the fault model: TLS (PS3.15 section B.9), with openssl and dcmtk as peers."""

import itertools
import logging
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.e2e import wire
from tests.e2e.programs import serving
from tests.e2e.test_fault_wire import Node, quiet
from tests.e2e.wire import Raw, pdu, unharmed

from dicomnode.errors import IncorrectlyConfigured, PeerUnreachable
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.lib.tls import TLS
from dicomnode.server.association import AssociationServer
from dicomnode.server.limits import Limits
from dicomnode.testing import (
    StoringNode,
    make_series,
    running_node,
    write_series,
)

__all__ = ["quiet"]
HASTY = Limits(idle_seconds=2.0, stall_seconds=2.0)


class Papers:
    """Authorities, and certificates of them for this machine."""

    def __init__(self, folder: Path, openssl: str) -> None:
        self._folder, self._openssl = folder, openssl
        for name in ("ca", "other"):
            self._run(
                "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt",
            )  # fmt: skip

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            [self._openssl, *arguments], cwd=self._folder, check=True, capture_output=True
        )

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def tls(self, name: str, ca: str = "ca", trusts: str | None = "ca", host: bool = True) -> TLS:
        """A new certificate of an authority, for somebody who believes another one."""
        (self._folder / f"{name}.ext").write_text("subjectAltName=IP:127.0.0.1")
        self._run(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        self._run(
            "x509", "-req", "-in", f"{name}.csr", "-days", "2", "-CAcreateserial",
            "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-extfile", f"{name}.ext",
            "-out", f"{name}.crt",
        )  # fmt: skip
        authority = None if trusts is None else self.path(f"{trusts}.crt")
        return TLS(self.path(f"{name}.crt"), self.path(f"{name}.key"), authority, host)


@pytest.fixture(scope="module")
def papers(peer: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"), peer("openssl"))


class Secured(Node):
    limits = HASTY
    _friend: TLS


@contextmanager
def secured(papers: Papers) -> Iterator[tuple[Secured, Address]]:
    """A node that takes TLS with certificates of our authority, and how a friend calls it."""
    with running_node(Secured, tls=papers.tls("node")) as node:
        friend = Address("127.0.0.1", node.port, "NODE", papers.tls("friend"))
        _serves(friend)
        yield node, friend
        _serves(friend)
        server = node._server
        assert server is not None
        assert node.wait(lambda: not server._visits, 20)


def _serves(address: Address) -> None:
    echo(address)
    assert [one.status for one in send(address, make_series(2))] == [0, 0]


def test_n8_images_go_over_tls_between_nodes_of_ours(papers: Papers) -> None:
    series = make_series(5)
    with running_node(StoringNode, tls=papers.tls("node")) as store:
        address = Address("127.0.0.1", store.port, "STORE", papers.tls("friend"))
        assert {one.status for one in send(address, series)} == {0}
        received = {one.SOPInstanceUID: one for one in store.wait_for_images(5)}
    for one in series:
        assert received[one.SOPInstanceUID].PixelData == one.PixelData


def _s_client(papers: Papers, port: int, *arguments: str) -> str:
    """What openssl says of a handshake, in which it then says nothing."""
    command = [papers._openssl, "s_client", "-connect", f"127.0.0.1:{port}", *arguments]
    done = subprocess.run(
        command, input="", capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "version", [["-tls1", "-cipher", "ALL:@SECLEVEL=0"], ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]]
)
def test_n8_old_versions_of_tls_are_refused(version: list[str], papers: Papers) -> None:
    with secured(papers) as (node, friend):
        assert friend.tls is not None
        ours = ["-cert", str(friend.tls.certificate), "-key", str(friend.tls.key)]
        said = _s_client(papers, node.port, *version, *ours)
        assert "Cipher is (NONE)" in said and "alert" in said
        for good in ("-tls1_2", "-tls1_3"):
            said = _s_client(papers, node.port, good, *ours)
            assert "Cipher is (NONE)" not in said
            assert "ECDHE" in said or "TLS_AES" in said


@pytest.mark.parametrize("cipher", ["AES128-SHA", "AES256-GCM-SHA384", "ECDHE-RSA-AES128-SHA256"])
def test_n8_ciphers_that_are_not_of_the_profile_are_refused(cipher: str, papers: Papers) -> None:
    with secured(papers) as (node, _):
        said = _s_client(papers, node.port, "-tls1_2", "-cipher", cipher)
        assert "Cipher is (NONE)" in said


def test_n8_strangers_are_refused_with_one_line_each(
    papers: Papers, caplog: pytest.LogCaptureFixture
) -> None:
    with secured(papers) as (node, _):
        with caplog.at_level(logging.INFO, "dicomnode"):
            for trouble in (
                None,
                papers.tls("stranger", ca="other"),
                # A friend who does not believe the node.
                papers.tls("doubter", trusts="other"),
            ):
                with pytest.raises(PeerUnreachable):
                    echo(Address("127.0.0.1", node.port, "NODE", trouble))
            with Raw(node) as plain:
                plain.send(wire.request())
                assert plain.receive()[0] in (0, 0x15)
            _s_client(papers, node.port, "-tls1_2")
        lines = [one for one in caplog.messages if "ended before there was an association" in one]
        # With TLS 1.3 a client learns only after its handshake that it is refused.
        assert 3 <= len(lines) <= 5
        own = [one for one in caplog.records if one.name.startswith("dicomnode")]
        assert not [one for one in own if one.exc_info]


def test_n8_a_peer_with_another_name_is_refused_unless_the_name_is_left_out(papers: Papers) -> None:
    with secured(papers) as (node, friend):
        with pytest.raises(PeerUnreachable, match="TLS"):
            echo(Address("localhost", node.port, "NODE", friend.tls))
        echo(Address("localhost", node.port, "NODE", papers.tls("easy", host=False)))


def test_n8_a_node_without_tls_hangs_up_on_a_client_with_tls(papers: Papers) -> None:
    with running_node(Node, limits=HASTY) as node, unharmed(node):
        start = time.monotonic()
        with pytest.raises(PeerUnreachable, match="TLS"):
            echo(Address("127.0.0.1", node.port, "NODE", papers.tls("friend")))
        assert time.monotonic() - start < 20


def test_n8_papers_that_are_none_are_told_before_a_node_listens(
    papers: Papers, tmp_path: Path
) -> None:
    good = papers.tls("node")
    (tmp_path / "junk").write_text("junk")
    for wrong in (
        TLS(tmp_path / "none", good.key),
        TLS(good.certificate, tmp_path / "junk"),
        TLS(good.certificate, good.key, tmp_path / "junk"),
        TLS(good.certificate, papers.path("ca.key")),
    ):
        with pytest.raises(IncorrectlyConfigured, match="tls: "), running_node(Node, tls=wrong):
            pass
        with pytest.raises(IncorrectlyConfigured, match="tls: "):
            echo(Address("127.0.0.1", 104, "NODE", wrong))


def test_n8_dcmtk_sends_to_us_over_tls(
    peer: Callable[[str], str], papers: Papers, tmp_path: Path
) -> None:
    with secured(papers) as (node, _):
        dcmtk = papers.tls("dcmtk")
        files = write_series(make_series(5), tmp_path)
        target = ["-aec", "NODE", "127.0.0.1", str(node.port)]
        ours = ["+tls", str(dcmtk.key), str(dcmtk.certificate), "+cf", papers.path("ca.crt")]

        def run(program: str, *arguments: str) -> int:
            command = [peer(program), *arguments, *target]
            command += map(str, files) if program == "storescu" else []
            return subprocess.run(command, timeout=60, check=False, capture_output=True).returncode

        assert run("echoscu", *ours) == 0
        assert run("storescu", *ours) == 0
        # Without a certificate, with one of another authority, and without TLS.
        stranger = papers.tls("stranger", ca="other")
        theirs = [
            "+tls",
            str(stranger.key),
            str(stranger.certificate),
            "+cf",
            papers.path("ca.crt"),
        ]
        for arguments in (["+tla", "-ic"], theirs, []):
            assert run("echoscu", *arguments) != 0


def test_n8_we_send_to_dcmtk_over_tls(
    peer: Callable[[str], str], papers: Papers, tmp_path: Path, free_port: int
) -> None:
    dcmtk, ours = papers.tls("dcmtk"), papers.tls("friend")
    command = [
        peer("storescp"), "+B", "-aet", "STORESCP", "-od", str(tmp_path),
        "+tls", str(dcmtk.key), str(dcmtk.certificate), "+cf", papers.path("ca.crt"), "-rc",
        str(free_port),
    ]  # fmt: skip
    series = make_series(3)
    address = Address("127.0.0.1", free_port, "STORESCP", ours)
    with serving(command, address):
        assert {one.status for one in send(address, series)} == {0}
        assert len(load(tmp_path)) == 3
        with pytest.raises(PeerUnreachable):
            echo(Address("127.0.0.1", free_port, "STORESCP"))


def test_n7_a_silent_client_keeps_nobody_from_a_handshake(papers: Papers) -> None:
    with secured(papers) as (node, friend), ExitStack() as stack:
        silent = [stack.enter_context(Raw(node)) for _ in range(20)]
        for k, one in enumerate(silent):
            # Nothing at all, or the start of a handshake.
            one.send(b"\x16\x03\x01\x02\x00"[: k % 6])
        start = time.monotonic()
        _serves(friend)
        assert time.monotonic() - start < HASTY.stall_seconds * 5
        for one in silent:
            assert one.receive()[0] in (0, 0x15)


def test_n7_a_client_that_says_nothing_after_its_handshake_ends_too(papers: Papers) -> None:
    with secured(papers) as (node, friend):
        assert friend.tls is not None
        plain = socket.create_connection(("127.0.0.1", node.port), 20)
        with friend.tls.client().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            _serves(friend)
            assert client.recv(100) == b""
        plain = socket.create_connection(("127.0.0.1", node.port), 20)
        with friend.tls.client().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            uid, data = wire.image()
            client.sendall(wire.request())
            found = client.recv(10_000)
            client.sendall(wire.store(uid, data)[:-10])
            while part := client.recv(10_000):
                found += part
            # The association was accepted, and aborted when the image stalled.
            assert found[0] == wire.ACCEPT and pdu(wire.ABORT, bytes(4))[:2] in found


def test_a_peer_that_reads_no_answer_is_given_up_once(
    papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(cafile=papers.path("ca.crt"))
    mine = papers.tls("deaf")
    context.load_cert_chain(mine.certificate, mine.key)
    moments: list[float] = []
    store = AssociationServer.store

    def storing(*arguments: Any) -> bytes:
        moments.append(time.monotonic())
        return store(*arguments)

    monkeypatch.setattr(AssociationServer, "store", storing)
    with running_node(Node, tls=papers.tls("node"), limits=HASTY) as node:
        raw = socket.socket()
        # So that few answers fit.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", node.port))
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as peer:
            peer.sendall(wire.request())
            assert peer.recv(6)[:1] == bytes([wire.ACCEPT])
            one = wire.store(*wire.image())
            with suppress(OSError):
                while len(moments) < 100_000:
                    peer.sendall(one)
        assert node.wait(lambda: not wire._connections(node), 20)
    # Each image but the last is answered before the next one: none comes after the answer that was waited for.
    assert max(b - a for a, b in itertools.pairwise(moments)) < 1.5
