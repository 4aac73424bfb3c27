"""`/healthz` and `/metrics`: what they tell, when they say that a node is not well, who can hurt them."""

import errno
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.errors import (
    CannotListen,
    CouldNotCompleteDIMSEMessage,
    IncorrectlyConfigured,
    OutOfResources,
    PeerUnreachable,
)
from dicomnode.lib.dimse import send
from dicomnode.server.input import AbstractInput
from dicomnode.server.meters import Counter, Histogram, Meters
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.web import Page, WebServer
from dicomnode.storage.store import Storage
from dicomnode.testing import (
    State,
    StoringNode,
    address_of,
    make_series,
    running_node,
    wait_for_cases,
)


def get(port: int | None, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def raw(port: int | None, request: bytes) -> bytes:
    """Everything that is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", port or 0), 30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def metrics(port: int | None) -> dict[str, float]:
    status, text = get(port, "/metrics")
    assert status == 200
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


class Two(AbstractInput):
    required_values = {"Modality": "CT"}

    def validate(self) -> bool:
        return self.images >= 2


class Node(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": Two}
    health_port = 0
    export_give_up_seconds = 0

    def process(self, input_data: dict[str, Any]) -> Any:
        images = list(input_data["ct"])
        if images[0].PatientID == "EVIL":
            raise ValueError(f"not {images[0].PatientName}")
        return images


def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    class Results(StoringNode):
        def filter(self, dataset: Dataset) -> bool:
            return bool(dataset.InstanceNumber == 1)

    with running_node(Results) as store:
        endpoint = address_of(store)
        with running_node(Node, root_data_directory=tmp_path, endpoints=[endpoint]) as node:
            images = make_series(2, 8, 8, patient_id="P1")
            other = make_series(1, 8, 8, patient_id="P1")
            other[0].Modality = "MR"
            send(address_of(node), [*images, *other])
            wait_for_cases(node, State.FAILED)
            send(address_of(node), make_series(1, 8, 8, patient_id="P2"))
            node.wait(lambda: len(node.cases()) == 2, 30)
            found = metrics(node.health_port)
    assert found['dicomnode_associations_total{outcome="accepted"}'] == 2
    assert found['dicomnode_instances_total{status="0x0000"}'] == 3
    assert found['dicomnode_instances_total{status="0xB006"}'] == 1
    assert found["dicomnode_received_bytes_total"] > 4 * 128
    assert found['dicomnode_cases{state="FAILED"}'] == 1
    assert found['dicomnode_cases{state="RECEIVING"}'] == 1
    assert found["dicomnode_failures_total"] == 1
    assert found[f'dicomnode_results_sent_total{{endpoint="{endpoint}"}}'] == 1
    assert found[f'dicomnode_results_failed_total{{endpoint="{endpoint}"}}'] == 1
    assert found[f'dicomnode_outbox_results{{endpoint="{endpoint}"}}'] == 1
    assert found[f'dicomnode_endpoint_down{{endpoint="{endpoint}"}}'] == 0
    for name in ("grind", "process", "export"):
        assert found[f"dicomnode_{name}_seconds_count"] == 1
        assert found[f'dicomnode_{name}_seconds_bucket{{le="+Inf"}}'] == 1
    assert found["dicomnode_workers_busy"] == 0
    assert found["dicomnode_healthy"] == 1
    assert found["dicomnode_disk_free_bytes"] > 0


def test_metrics_count_who_is_not_let_in(tmp_path: Path) -> None:
    with running_node(Node, require_calling_aet=["SCANNER"]) as node:
        with pytest.raises(PeerUnreachable):
            send(address_of(node), make_series(1, 8, 8))
        found = metrics(node.health_port)
    assert found['dicomnode_associations_total{outcome="rejected"}'] == 1
    with running_node(Node, allowed_networks=["10.0.0.0/8"]) as node:
        with pytest.raises(CouldNotCompleteDIMSEMessage):
            send(address_of(node), make_series(1, 8, 8))
        found = metrics(node.health_port)
    assert found['dicomnode_associations_total{outcome="refused"}'] == 1


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    with running_node(Node, root_data_directory=tmp_path) as node:
        send(address_of(node), make_series(1, 8, 8))
        _, text = get(node.health_port, "/metrics")
    sample = r'[a-z_]+(\{[a-z]+="([^"\\\n]|\\.)*"\})? [0-9.e+-]+'
    comment = r"# (HELP|TYPE) [a-z_]+ .+"
    for line in text.splitlines():
        assert re.fullmatch(f"{sample}|{comment}", line), line
    typed = re.findall(r"^# TYPE ([a-z_]+)", text, re.MULTILINE)
    assert len(typed) == len(set(typed)) > 10


def test_d3_no_patient_is_in_metrics_or_health(tmp_path: Path) -> None:
    with running_node(Node, root_data_directory=tmp_path) as node:
        images = make_series(2, 8, 8, patient_id="EVIL")
        for image in images:
            image.PatientName, image.PatientBirthDate = "Zyxname^Zyxgiven", "19330417"
        send(address_of(node), images)
        wait_for_cases(node, State.FAILED)
        told = get(node.health_port, "/metrics")[1] + get(node.health_port, "/healthz")[1]
    assert not re.search("zyx|1933|evil|1\\.2\\.826", told, re.IGNORECASE)


def test_a_node_is_well_while_it_listens_and_its_storage_takes_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(Node, root_data_directory=tmp_path) as node:
        assert get(node.health_port, "/healthz") == (200, '{"status": "ok", "reasons": []}\n')

        def full(storage: Storage) -> None:
            raise OutOfResources("No space left on device")

        monkeypatch.setattr(Storage, "probe", full)
        monkeypatch.setattr("dicomnode.server.health._TRY_SECONDS", 0.0)
        status, told = get(node.health_port, "/healthz")
        assert status == 503
        assert "No space left" in json.loads(told)["reasons"][0]
        assert metrics(node.health_port)["dicomnode_healthy"] == 0
        monkeypatch.undo()
        monkeypatch.setattr("dicomnode.server.health._TRY_SECONDS", 0.0)
        assert get(node.health_port, "/healthz")[0] == 200


LIMITED = """
import os, resource, sys
from pathlib import Path
from dicomnode.testing import StoringNode
node = StoringNode(start=False)
node.ip, node.port, node.health_port = "127.0.0.1", 0, 0
node.root_data_directory = Path(sys.argv[1])
node.open(blocking=False)
print(node.health_port, flush=True)
sys.stdin.readline()
held = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    print("NONE LEFT", flush=True)
sys.stdin.readline()
for one in held:
    os.close(one)
print("FREE", flush=True)
sys.stdin.readline()
"""


def test_s5_a_node_without_file_descriptors_says_so_and_recovers(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            lines = iter(process.stdout.readline, "")
            port = next(int(line) for line in lines if line.strip().isdigit())

            def go_on(word: str) -> None:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                assert any(word in line for line in lines)

            assert get(port, "/healthz")[0] == 200
            go_on("NONE LEFT")
            end = time.monotonic() + 30
            while (answer := get(port, "/healthz"))[0] == 200 and time.monotonic() < end:
                pass
            assert answer[0] == 503
            assert "Too many open files" in answer[1]
            go_on("FREE")
            while get(port, "/healthz")[0] != 200 and time.monotonic() < end:
                pass
            assert get(port, "/healthz")[0] == 200
        finally:
            process.kill()


def test_s5_a_node_whose_folder_is_gone_says_so_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.health._TRY_SECONDS", 0.0)
    incoming = tmp_path / ".dicomnode" / "incoming"
    with running_node(Node, root_data_directory=tmp_path) as node:
        incoming.rename(tmp_path / "elsewhere")
        status, told = get(node.health_port, "/healthz")
        assert status == 503 and "No such file" in told
        assert str(tmp_path) not in told
        (tmp_path / "elsewhere").rename(incoming)
        assert get(node.health_port, "/healthz")[0] == 200


def test_s4_a_node_whose_disk_does_not_flush_says_so_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.health._TRY_SECONDS", 0.0)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with running_node(Node, root_data_directory=tmp_path) as node:
        with monkeypatch.context() as broken:
            broken.setattr("dicomnode.storage.instances.os.fsync", fails)
            status, told = get(node.health_port, "/healthz")
        assert status == 503 and "EIO" in told
        assert get(node.health_port, "/healthz")[0] == 200


def test_a_node_whose_ledger_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.health._TRY_SECONDS", 0.0)
    with running_node(Node, root_data_directory=tmp_path) as node:
        assert get(node.health_port, "/healthz")[0] == 200
        assert node._storage is not None
        with sqlite3.connect(tmp_path / ".dicomnode" / "ledger.sqlite", timeout=0) as other:
            # Another program holds it.
            other.execute("BEGIN IMMEDIATE")
            node._storage.ledger._db.execute("PRAGMA busy_timeout = 10")
            status, told = get(node.health_port, "/healthz")
    assert status == 503 and "the ledger cannot be written" in told


def test_settings_that_cannot_work_are_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(CannotListen, match="health_port"),
    ):
        running_node(Node, health_port=taken.getsockname()[1]).__enter__()
    for name, value in (("health_port", "9000"), ("health_port", -1), ("health_ip", None)):
        with pytest.raises(IncorrectlyConfigured, match=name):
            running_node(Node, **{name: value}).__enter__()


def test_a_node_without_health_port_serves_nothing() -> None:
    with running_node(StoringNode) as node:
        assert node.health_port is None
        assert not any(one.name == "health" for one in threading.enumerate())


# The server


@pytest.fixture
def server() -> Iterator[int]:
    pages = {"/here": Page(200, "here\n"), "/large": Page(200, "x" * 5_000_000)}
    server = WebServer(pages.get, logging.getLogger("dicomnode.test"))
    port = server.open("127.0.0.1", 0)
    yield port
    server.close()
    assert not any(one.name == "health" for one in threading.enumerate())


def test_only_known_pages_are_given_and_only_to_get(server: int) -> None:
    assert get(server, "/here") == (200, "here\n")
    assert get(server, "/here?x=1") == (200, "here\n")
    for path in ("/", "/nope", "/../etc/passwd", "/here/", "/%68ere", "//here"):
        assert get(server, path)[0] == 404
    for method in (b"POST", b"DELETE", b"get", b"CONNECT"):
        assert raw(server, method + b" /here HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert raw(server, b"HEAD /here HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    for nonsense in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\n\n", b"A" * 20_000):
        assert raw(server, nonsense).startswith(b"HTTP/1.1 400 ")


def test_d4_the_host_that_is_named_changes_nothing(server: int) -> None:
    for host in (b"evil.example", b"127.0.0.1\r\nX: y", b""):
        answer = raw(server, b"GET /here HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert answer == raw(server, b"GET /here HTTP/1.1\r\n\r\n")


def test_a_large_page_arrives_whole(server: int) -> None:
    assert len(get(server, "/large")[1]) == 5_000_000


def test_d5_slow_clients_large_bodies_and_many_connections_keep_nobody_out(server: int) -> None:
    def connection() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server), 30)

    before = descriptors()
    slow = [connection() for _ in range(200)]
    for one in slow:
        try:
            one.sendall(b"GET /he")
        except OSError:
            continue
    # These never read their answer.
    greedy = [connection() for _ in range(20)]
    for one in greedy:
        one.sendall(b"GET /large HTTP/1.1\r\n\r\n")
    start = time.monotonic()
    assert get(server, "/here")[0] == 200
    assert time.monotonic() - start < 4
    with closing(connection()) as body:
        body.sendall(b"GET /here HTTP/1.1\r\nContent-Length: 4294967296\r\n\r\n")
        sent = 0
        with pytest.raises(OSError, match=r"pipe|reset"):  # noqa: PT012
            while sent < 1 << 30:
                sent += body.send(b"x" * 65536)
    assert sent < 1 << 27
    assert get(server, "/here")[0] == 200
    for one in slow + greedy:
        one.close()
    end = time.monotonic() + 30
    while descriptors() > before and time.monotonic() < end:
        get(server, "/here")
    assert descriptors() <= before


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_d5_a_slow_client_is_dropped_at_its_deadline(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.server.web._DEADLINE_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", server), 30) as one:
        for _ in range(100):
            try:
                one.sendall(b"G")
            except OSError:
                return
            one.settimeout(0.1)
            try:
                if one.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("it was never dropped")


# Meters


def test_a_page_that_hangs_keeps_neither_the_node_open_nor_for_ever_its_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicomnode.server.web._DEADLINE_SECONDS", 0.2)
    asked, go_on = threading.Event(), threading.Event()

    def page(path: str) -> Page | None:
        asked.set()
        go_on.wait(60)
        return None

    server = WebServer(page, logging.getLogger("test"))
    port = server.open("127.0.0.1", 0)
    thread = server._thread
    assert thread is not None
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert asked.wait(30)
        server.close()
        go_on.set()
        thread.join(30)
        assert not thread.is_alive()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", port))


def test_counters_and_histograms_add_up_over_threads() -> None:
    counter, histogram = Counter("c", "told", "kind"), Histogram("h", "told")

    def work() -> None:
        for k in range(1000):
            counter.add(label="a" if k % 2 else "b")
            histogram.observe(0.2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value("a") == counter.value("b") == 2000
    lines = list(histogram.lines())
    assert 'h_bucket{le="0.1"} 0' in lines
    assert 'h_bucket{le="0.25"} 4000' in lines
    assert "h_count 4000" in lines
    assert "h_sum 800.000000" in lines


def test_labels_are_escaped() -> None:
    counter = Counter("c", "told", "kind")
    counter.add(label='a"\\\n')
    assert list(counter.lines())[-1] == 'c{kind="a\\"\\\\\\n"} 1'


def test_each_node_has_meters_of_its_own() -> None:
    assert Meters().failures is not Meters().failures
