"""Sending over TLS: to our own node and to dcmtk, and to those that should not be believed."""

import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from tests.e2e.programs import serving

from dicomnode.errors import IncorrectlyConfigured, PeerUnreachable
from dicomnode.lib import requestor
from dicomnode.lib.dimse import Address, echo, send
from dicomnode.lib.tls import TLS
from dicomnode.testing import StoringNode, make_series, running_node


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Keys and certificates of two that certify themselves, for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    found = {}
    for name in ("ours", "theirs"):
        key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
        subprocess.run(
            ["/usr/bin/openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-keyout", str(key), "-out", str(certificate), "-subj", f"/CN={name}",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        found[f"{name}.key"], found[name] = key, certificate
    return found


def ours(files: dict[str, Path], ca: str = "theirs", **options: Any) -> TLS:
    return TLS(files["ours"], files["ours.key"], files[ca], **options)


def big() -> Dataset:
    (image,) = make_series(1, 8, 8)
    image.Rows, image.Columns = 2048, 2048
    image.PixelData = bytes(range(256)) * (2048 * 2048 * 2 // 256)
    return image


def test_a_node_gets_small_and_large_objects_over_tls(files: dict[str, Path]) -> None:
    theirs = TLS(files["theirs"], files["theirs.key"], files["ours"])
    images = [*make_series(20, 64, 64), big()]
    with running_node(StoringNode, tls=theirs) as store:
        address = Address("127.0.0.1", store.port, "STORE", ours(files))
        echo(address)
        assert [one.status for one in send(address, images)] == [0] * 21
        assert store.received[-1].PixelData == images[-1].PixelData


def test_a_peer_that_is_not_to_be_believed_gets_nothing(files: dict[str, Path]) -> None:
    theirs = TLS(files["theirs"], files["theirs.key"])
    with running_node(StoringNode, tls=theirs) as store:
        for tls in (ours(files, ca="ours"), None):
            with pytest.raises(PeerUnreachable):
                send(Address("127.0.0.1", store.port, "STORE", tls), make_series(1))
        assert store.received == []


def test_a_peer_without_tls_is_told(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requestor, "_CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=lambda: silent.accept()[0].recv(1), daemon=True)
        thread.start()
        start = time.monotonic()
        with pytest.raises(PeerUnreachable, match="no TLS with it"):
            echo(Address("127.0.0.1", silent.getsockname()[1], "SILENT", ours(files)))
        assert time.monotonic() - start < 20


def test_storescp_with_tls_gets_all(files: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["/usr/bin/storescp", "+tls", files["theirs.key"], files["theirs"], "+cf",
               files["ours"], "-od", tmp_path, port]  # fmt: skip
    address = Address("127.0.0.1", port, "STORESCP", ours(files))
    with serving(command, address):
        assert all(one.is_stored for one in send(address, [*make_series(10, 64, 64), big()]))
    assert len(list(tmp_path.iterdir())) == 11


def test_files_that_are_not_there_are_told_when_the_node_opens(tmp_path: Path) -> None:
    tls = TLS(tmp_path / "no.pem", tmp_path / "no.key")
    node = StoringNode(start=False)
    node.ip, node.port = "127.0.0.1", 0
    node.endpoints = [Address("127.0.0.1", 1, "X", tls)]
    with pytest.raises(IncorrectlyConfigured, match="tls"):
        node.open(blocking=False)
    node.endpoints = [Address("127.0.0.1", 1, "X", "yes")]  # type: ignore[arg-type]
    with pytest.raises(IncorrectlyConfigured, match="tls"):
        node.open(blocking=False)
