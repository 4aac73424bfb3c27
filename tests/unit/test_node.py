"""The class that users subclass: construction, opening, settings, logging."""

import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.errors import (
    CannotListen,
    IncorrectlyConfigured,
    InvalidRootDataDirectory,
    UnknownCase,
)
from dicomnode.lib.dimse import Address, echo
from dicomnode.server.input import AbstractInput
from dicomnode.server.limits import Limits
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import address_of, running_node


class Never(AbstractInput):
    def validate(self) -> bool:
        return False


class Node(AbstractPipeline):
    ip = "127.0.0.1"
    port = 0


def test_both_modules_hold_the_class() -> None:
    from dicomnode.server import node, nodes

    assert node.AbstractPipeline is nodes.AbstractPipeline


def test_the_first_example_of_the_tutorial_opens_and_blocks_until_it_is_stopped() -> None:
    class MyPipeline(AbstractPipeline):
        pass

    assert (MyPipeline.ip, MyPipeline.port) == ("localhost", 104)
    assert MyPipeline.ae_title

    class OnAFreePort(MyPipeline):
        port = 0

    script = (
        "from dicomnode.server.node import AbstractPipeline\n"
        "class MyPipeline(AbstractPipeline):\n"
        "  port = 0\n"
        "MyPipeline()\n"
        "print('after')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-uc", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"listens on localhost:(\d+)", process.stdout.readline())
        assert found
        echo(Address("localhost", int(found.group(1)), AbstractPipeline.ae_title))
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout.read().rstrip().endswith("after")


def test_start_false_does_not_open() -> None:
    node = Node(start=False)
    assert node.port == 0
    node.close()


def test_port_may_be_set_before_opening_and_zero_finds_a_free_one(free_port: int) -> None:
    node = Node(start=False)
    node.port = free_port
    node.open(blocking=False)
    echo(address_of(node))
    node.close()
    with running_node(Node) as other:
        assert other.port > 0
    assert Node.port == 0


def test_with_opens_and_closes_and_a_node_can_be_opened_again() -> None:
    node = Node(start=False)
    for _ in range(2):
        with node as same:
            assert same is node
            echo(address_of(node))
        with pytest.raises(Exception, match="cannot be reached"):
            echo(address_of(node))


def test_opening_blocks_until_another_thread_closes() -> None:
    node = Node(start=False)
    thread = threading.Thread(target=node.open)
    thread.start()
    deadline = time.monotonic() + 20
    while node._server is None and time.monotonic() < deadline:
        thread.join(0.01)
    echo(address_of(node))
    node.close()
    thread.join(20)
    assert not thread.is_alive()


def test_opening_twice_is_an_error_and_closing_twice_is_none() -> None:
    with running_node(Node) as node:
        with pytest.raises(IncorrectlyConfigured, match="open already"):
            node.open(blocking=False)
        echo(address_of(node))
        node.close()
        node.close()


def test_a_taken_port_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = Node(start=False)
        node.port = port
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port}.*set `port`"):
            node.open(blocking=False)
    node.open(blocking=False)
    node.close()


def test_a_port_that_is_not_allowed_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    node = Node(start=False)
    node.port = 104
    with pytest.raises(CannotListen, match=r":104: Permission denied.*below 1024.*11112"):
        node.open(blocking=False)


@pytest.mark.parametrize(("ip", "port"), [("203.0.113.7", 0), ("127.0.0.1", 70000), ("no host", 0)])
def test_an_impossible_address_is_an_error(ip: str, port: int) -> None:
    node = Node(start=False)
    node.ip, node.port = ip, port
    with pytest.raises(CannotListen, match=re.escape(ip)):
        node.open(blocking=False)


def test_the_root_may_be_text_or_path_and_is_made(tmp_path: Path) -> None:
    for root in (str(tmp_path / "a" / "b"), tmp_path / "c"):
        with running_node(Node, root_data_directory=root):
            assert Path(root, ".dicomnode", "ledger.sqlite").exists()


def test_a_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InvalidRootDataDirectory, match="file"),
        running_node(Node, root_data_directory=tmp_path / "file"),
    ):
        pass


def test_two_nodes_do_not_share_a_root(tmp_path: Path) -> None:
    with (
        running_node(Node, root_data_directory=tmp_path),
        pytest.raises(InvalidRootDataDirectory, match="another running node"),
        running_node(Node, root_data_directory=tmp_path),
    ):
        pass
    with running_node(Node, root_data_directory=tmp_path):
        pass


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ct": Never()}, "the class itself, not an instance"),
        ({"ct": int}, "subclass of AbstractInput"),
        ({"ct": AbstractInput}, "has to define validate"),
        ({"": Never}, "name"),
        ({"ct": type("T", (Never,), {"required_tags": ["NoSuchKeyword"]})}, "no DICOM tag"),
        ({"ct": type("T", (Never,), {"required_values": {"Modalty": "CT"}})}, "no DICOM tag"),
    ],
)
def test_wrong_inputs_are_found_when_the_pipeline_is_made(
    inputs: dict[str, Any], message: str
) -> None:
    kind = type("Wrong", (Node,), {"input": inputs})
    with pytest.raises(IncorrectlyConfigured, match=message):
        kind(start=False)


def test_a_wrong_identifier_tag_is_found_when_the_pipeline_is_made() -> None:
    kind = type("Wrong", (Node,), {"patient_identifier_tag": "PatientIdent"})
    with pytest.raises(IncorrectlyConfigured, match="patient_identifier_tag"):
        kind(start=False)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("endpoints", Address("127.0.0.1", 1, "X")),
        ("endpoints", [("127.0.0.1", 1, "X")]),
        ("require_calling_aet", "SCANNER"),
        ("port", "104"),
        ("workers", -1),
        ("memory_limit", 0),
        ("ae_title", ""),
        ("ae_title", "A\\B"),
        ("ae_title", "A\nB"),
        ("require_calling_aet", ["much too long for a title"]),
        ("root_data_directory", ""),
        ("input", None),
        ("ae_title", "longer than sixteen characters"),
        ("log_level", "LOUD"),
    ],
)
def test_wrong_settings_are_named(attribute: str, value: object) -> None:
    kind = type("Wrong", (Node,), {attribute: value})
    with pytest.raises(IncorrectlyConfigured, match=attribute):
        kind(start=False).open(blocking=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("associations", 0),
        ("associations", 2.0),
        ("associations", None),
        ("associations_per_address", -1),
        ("instances", True),
        ("association_bytes", "1 GiB"),
        ("instance_bytes", 1 << 80),
        ("pdu_bytes", 100),
        ("pdu_bytes", 1 << 32),
        ("idle_seconds", 0),
        ("idle_seconds", float("nan")),
        ("stall_seconds", float("inf")),
        ("bytes_per_second", 0),
        ("free_bytes", -1),
    ],
)
def test_wrong_limits_are_named_with_what_is_expected(field: str, value: object) -> None:
    with pytest.raises(IncorrectlyConfigured, match=rf"{field} has to be .* not {value!r}"):
        Limits(**{field: value})  # type: ignore[arg-type]


def test_a_setting_may_be_changed_before_opening() -> None:
    node = Node(start=False)
    node.endpoints = [("127.0.0.1", 1, "X")]  # type: ignore[list-item]
    with pytest.raises(IncorrectlyConfigured, match="endpoints"):
        node.open(blocking=False)


def test_class_attributes_are_copied_never_changed() -> None:
    class Kind(Node):
        input = {"ct": Never}
        endpoints: list[Address] = []

    first, second = Kind(start=False), Kind(start=False)
    first.endpoints.append(Address("127.0.0.1", 1, "X"))
    first.input["mr"] = Never
    assert Kind.endpoints == second.endpoints == []
    assert set(Kind.input) == set(second.input) == {"ct"}


def test_post_init_is_called_before_the_node_listens() -> None:
    seen = []

    class Kind(Node):
        def post_init(self) -> None:
            seen.append(self.port)

    with running_node(Kind):
        assert seen == [0]


def test_a_post_init_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    class Kind(Node):
        root_data_directory = tmp_path

        def post_init(self) -> None:
            raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        Kind()
    with running_node(Node, root_data_directory=tmp_path):
        pass


def test_retry_of_an_unknown_case_or_on_a_closed_node_is_an_error() -> None:
    node = Node(start=False)
    with pytest.raises(UnknownCase, match="closed"):
        node.retry(1)
    with running_node(Node) as node, pytest.raises(UnknownCase, match="no case 7"):
        node.retry(7)


def test_the_log_goes_to_the_screen_and_the_root_logger_is_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = list(logging.getLogger().handlers), logging.getLogger().level
    with running_node(Node) as node:
        node.logger.info("hello")
    out = capsys.readouterr().out
    assert re.search(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d dicomnode\.\S+ INFO hello$", out, re.M)
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
    assert node.logger.handlers == []


def test_the_log_file_rotates_on_monday_at_midnight_and_eight_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "node.log"
    with running_node(Node, log_path=str(path), log_format="%(message)s") as node:
        (handler,) = node.logger.handlers
        assert isinstance(handler, TimedRotatingFileHandler)
        at = datetime.fromtimestamp(handler.rolloverAt)
        assert (at.weekday(), at.hour, at.minute) == (0, 0, 0)
        assert handler.backupCount == 8
        node.logger.info("hello")
    assert "hello\n" in path.read_text()


def test_log_level_and_backups_are_settings(tmp_path: Path) -> None:
    with running_node(Node, log_path=tmp_path / "log", log_level="ERROR", backup_weeks=2) as node:
        node.logger.info("quiet")
        (handler,) = node.logger.handlers
        assert isinstance(handler, TimedRotatingFileHandler)
        assert handler.backupCount == 2
    assert (tmp_path / "log").read_text() == ""


def test_two_nodes_do_not_log_each_others_lines(tmp_path: Path) -> None:
    with (
        running_node(Node, log_path=tmp_path / "a") as first,
        running_node(Node, log_path=tmp_path / "b") as second,
    ):
        first.logger.info("of the first")
        second.logger.info("of the second")
    assert "of the second" not in (tmp_path / "a").read_text()
    assert "of the first" not in (tmp_path / "b").read_text()


def test_process_without_a_definition_is_an_error_when_it_is_called() -> None:
    with pytest.raises(IncorrectlyConfigured, match=r"does not define process"):
        Node(start=False).process({})


def test_importing_is_quick_and_starts_nothing() -> None:
    script = (
        "import sys, threading, time; before = set(sys.modules); t = time.perf_counter();"
        "import dicomnode; t = time.perf_counter() - t;"
        "new = set(sys.modules) - before;"
        "assert t < 0.15, t;"
        "assert not {'pydicom', 'numpy', 'pynetdicom'} & new;"
        "assert threading.active_count() == 1; assert dicomnode.__version__"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_pipeline_with_process_signature_of_the_tutorial() -> None:
    class MyPipeline(Node):
        input = {"argument_name": Never}
        endpoints = [Address(ip="", port=104, ae_title="")]

        def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
            return []

    with running_node(MyPipeline) as node:
        echo(address_of(node))


def test_a_program_that_shows_its_log_on_the_screen_sees_each_line_once() -> None:
    script = (
        "import logging\n"
        "logging.basicConfig()\n"
        "from dicomnode.server.node import AbstractPipeline\n"
        "class Node(AbstractPipeline):\n"
        "    port = 0\n"
        "with Node(start=False): pass\n"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert (run.stdout + run.stderr).count("listens on") == 1


def test_the_names_of_the_tutorial_can_be_imported() -> None:
    from dicomnode.lib.grinders import GrindType

    assert GrindType is not None


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("required_tags", None),
        ("required_tags", 5),
        ("required_tags", "PatientID"),
        ("required_values", None),
        ("required_values", []),
        ("required_values", "x"),
        ("image_grinder", None),
        ("image_grinder", 5),
    ],
)
def test_an_input_that_cannot_work_is_told_with_its_name_and_attribute(
    attribute: str, value: object
) -> None:
    kind = type("Wrong", (AbstractInput,), {"validate": lambda self: True, attribute: value})

    class Node(AbstractPipeline):
        input = {"thorax": kind}

    with pytest.raises(IncorrectlyConfigured, match=rf"'thorax'.*{attribute}"):
        Node(start=False)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("ip", 5),
        ("ip", None),
        ("require_calling_aet", None),
        ("require_calling_aet", 5),
        ("root_data_directory", 5),
        ("log_path", 5),
        ("log_path", ""),
        ("log_format", "{x}"),
        ("log_format", "%"),
        ("log_format", "%(foo)s"),
        ("endpoints", [Address("a", "104", "b")]),
        ("endpoints", [Address("a", 104, "b" * 20)]),
    ],
)
def test_a_setting_that_cannot_work_is_told_by_its_name(attribute: str, value: object) -> None:
    kind = type("Wrong", (AbstractPipeline,), {attribute: value, "port": 0})
    with pytest.raises(IncorrectlyConfigured, match=attribute), kind(start=False):
        pass
