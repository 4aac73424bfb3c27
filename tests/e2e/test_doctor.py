"""`dicomnode doctor --pipeline`: one line for each thing, the remedy, and an exit code."""

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from tests.e2e.programs import Command, pipeline_file
from typer.testing import CliRunner

from dicomnode.cli import checkup
from dicomnode.cli.checkup import file_system_of
from dicomnode.cli.main import app
from dicomnode.server.keeper import descendants
from dicomnode.testing import StoringNode, running_node

SOUND = """
class Node(Base):
    log_path = Path(__file__).parent / "logs" / "node.log"
    endpoints = [Address("127.0.0.1", {port}, "STORE")]
    def process(self, input_data):
        return None
"""


@pytest.fixture
def store_port() -> Iterator[int]:
    with running_node(StoringNode) as store:
        yield store.port


def doctor(where: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["doctor", "--pipeline", where])
    assert not result.stderr
    lines = result.stdout.splitlines()
    assert all(line.startswith(("ok       ", "warning  ", "error    ")) for line in lines), lines
    return result.exit_code, lines


def found(lines: list[str], level: str, part: str) -> bool:
    return any(line.startswith(level) and part in line for line in lines)


def test_a_sound_configuration_has_no_error_and_leaves_nothing(
    tmp_path: Path, store_port: int
) -> None:
    where = pipeline_file(tmp_path, SOUND.format(port=store_port))
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    code, lines = doctor(where)
    assert code == 0, lines
    assert not found(lines, "error", "")
    for part in (
        "defines Node", "port 0 of 127.0.0.1 is free", "can be written", "GiB are free",
        "the log can be written", "files open", "transfer syntaxes are accepted and decoded",
        "answers C-ECHO",
    ):  # fmt: skip
        assert found(lines, "", part), part
    after = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert after == before


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("class Node(Base): port = -1\n", "port has to be"),
        ("class Node(Base): input = {}\n", "input is empty"),
        ("class Node(Base): pass\n", "process() is not defined"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("class Node(Base): ip = '203.0.113.7'\n", "address of this machine"),
        ("class Node(Base): root_data_directory = '/dev/null'\n", "no folder"),
        ("class Node(Base): log_path = '/dev/null/x/node.log'\n", "log_path"),
        ("class Node(Base): endpoints = [Address('127.0.0.1', 9, 'X')]\n", "cannot be reached"),
        ("class Node(Base): health_ip, health_port = '203.0.113.7', 0\n", "health_port"),
    ],
)
def test_what_cannot_work_is_an_error_with_a_remedy(code: str, told: str, tmp_path: Path) -> None:
    exit_code, lines = doctor(pipeline_file(tmp_path, code))
    assert exit_code == 1
    assert found(lines, "error", told), lines


ISOLATED = """
    isolation = "process"
    def post_init(self):
        raise RuntimeError("not called")
    def process(self, input_data):
        return None
"""


def test_a_pipeline_that_worker_processes_can_import_is_told(tmp_path: Path) -> None:
    before = set(descendants(os.getpid()))
    exit_code, lines = doctor(pipeline_file(tmp_path, f"class Node(Base):{ISOLATED}"))
    assert exit_code == 0, lines
    assert found(lines, "ok", "a worker process can import and make Node")
    assert set(descendants(os.getpid())) <= before


def test_a_module_that_only_this_process_has_is_missing_in_a_worker_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "only_here", ModuleType("only_here"))
    code = f"import only_here\nclass Node(Base):{ISOLATED}"
    exit_code, lines = doctor(pipeline_file(tmp_path, code))
    assert exit_code == 1
    assert found(
        lines, "error", f"cannot be imported by {sys.executable}: No module named 'only_here'"
    )
    assert found(lines, "error", "install it there, or put it beside that file")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (f"def make():\n    class Node(Base):{ISOLATED.replace(chr(10), chr(10) + '    ')}\n"
         "    return Node\nNode = make()\n", "define it in a file, at the top level"),
        ("if __name__ == '__main__':\n    class Node(Base): isolation = 'process'\n",
         "has no pipeline Node"),
        (f"import not_there\nclass Node(Base):{ISOLATED}", "install it for"),
        (f"class Node(Base):{ISOLATED}\nNode()\n", 'below `if __name__ == "__main__":`'),
    ],
)  # fmt: skip
def test_what_keeps_a_worker_process_from_importing_is_an_error_with_a_remedy(
    code: str, told: str, tmp_path: Path
) -> None:
    exit_code, lines = doctor(pipeline_file(tmp_path, code))
    assert exit_code == 1
    assert found(lines, "error", told), lines


def test_what_is_doubtful_is_a_warning(tmp_path: Path) -> None:
    code = """
class Node(Base):
    ip = "0.0.0.0"
    root_data_directory = None
    def process(self, input_data):
        return None
"""
    exit_code, lines = doctor(pipeline_file(tmp_path, code))
    assert exit_code == 0
    for part in ("everybody who reaches", "in memory, and lost", "endpoints is empty"):
        assert found(lines, "warning", part), lines


def test_a_port_that_another_program_uses_is_an_error_but_not_our_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = f"class Node(Base): port = {taken.getsockname()[1]}\n"
        assert found(doctor(pipeline_file(tmp_path, code))[1], "error", "another program uses it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"class Node(Base):\n    port = {port}\n    process = lambda self, data: None\n"
    where = pipeline_file(tmp_path, code)
    with Command("run", where) as node:
        node.until("listens")
        exit_code, lines = doctor(where)
    assert exit_code == 0
    assert found(lines, "ok", "is used, and a node runs with this root_data_directory")


def test_a_low_port_without_the_right_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(ip: str, port: int) -> OSError:
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkup, "_bind", denied)
    _, lines = doctor(pipeline_file(tmp_path, "class Node(Base): port = 104\n"))
    assert found(lines, "error", "ports below 1024 need privileges")


def test_few_files_slow_flushes_and_full_disks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(checkup, "_try_folder", lambda _: 0.2)
    code = f"class Node(Base): limits = Limits(free_bytes={1 << 60})\n"
    imports = "from dicomnode.server.limits import Limits\n"
    _, lines = doctor(pipeline_file(tmp_path, imports + code))
    assert found(lines, "warning", "256 files open")
    assert found(lines, "warning", "fsync is slow")
    assert found(lines, "error", "make room")


def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(tmp_path: Path) -> None:
    mounts = "\n".join(
        [
            "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
            f"2 1 0:1 / {tmp_path.parent} rw - tmpfs tmpfs rw",
            f"3 1 0:2 /x {tmp_path} rw,noatime shared:2 master:3 - nfs4 server:/x rw",
            f"4 1 0:3 / {tmp_path}-other rw - cifs //server/y rw",
            f"5 1 0:3 / {tmp_path}/with\\040blank rw - fuse.sshfs z rw",
            "nonsense",
        ]
    )
    (tmp_path / "with blank").mkdir()
    assert file_system_of(tmp_path / "deep" / "below", mounts) == "nfs4"
    assert file_system_of(tmp_path.parent, mounts) == "tmpfs"
    assert file_system_of(tmp_path / "with blank", mounts) == "fuse.sshfs"
    assert file_system_of(Path("/"), mounts) == "ext4"
    assert file_system_of(Path("/"), "") == ""


@pytest.mark.parametrize(
    ("kind", "told"),
    [("nfs4", "another machine"), ("tmpfs", "power cut"), ("overlay", "mount a volume")],
)
def test_a_folder_on_no_local_disk_is_warned_of(
    kind: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "file_system_of", lambda folder, mounts: kind)
    _, lines = doctor(pipeline_file(tmp_path, "class Node(Base): pass\n"))
    assert found(lines, "warning", told)


@pytest.mark.parametrize(
    ("days", "level", "told"),
    [
        (400.5, "ok", "is valid for 400 days"),
        (5.5, "warning", "is valid for 5 days"),
        (-1, "error", "expired"),
    ],
)
def test_certificates_are_looked_at_before_they_expire(
    days: float, level: str, told: str, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    key, certificate = certified(tmp_path, peer("openssl"), days)
    key.chmod(0o644)
    imports = "from dicomnode.lib.tls import TLS\n"
    code = f"class Node(Base): tls = TLS({str(certificate)!r}, {str(key)!r})\n"
    _, lines = doctor(pipeline_file(tmp_path, imports + code))
    assert found(lines, level, told), lines
    if level != "error":
        assert found(lines, "warning", "chmod 600")
        assert found(lines, "warning", "tls has no ca")


def certified(folder: Path, openssl: str, days: float) -> tuple[Path, Path]:
    """A key, and a certificate for it that ends in so many days, or did."""
    key, request, certificate = (folder / name for name in ("key.pem", "request.pem", "node.pem"))
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    settings = folder / "openssl.cnf"
    settings.write_text(
        "[req]\ndistinguished_name = name\n[name]\n[ca]\ndefault_ca = own\n[own]\npolicy = any\n"
        f"database = {folder}/index.txt\nserial = {folder}/serial\nnew_certs_dir = {folder}\n"
        "default_md = sha256\n[any]\ncommonName = supplied\n"
    )
    begin, end = (
        (datetime.now(UTC) + timedelta(days=day)).strftime("%Y%m%d%H%M%SZ")
        for day in (min(days, 0) - 9, days)
    )
    for command in (
        ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key,
         "-out", request, "-subj", "/CN=node"],
        ["ca", "-selfsign", "-batch", "-keyfile", key, "-in", request, "-out", certificate,
         "-notext", "-startdate", begin, "-enddate", end],
    ):  # fmt: skip
        subprocess.run(
            [openssl, *map(str, command), "-config", str(settings)], check=True, capture_output=True
        )
    return key, certificate


def test_a_certificate_that_is_none_is_an_error(tmp_path: Path) -> None:
    imports = "from dicomnode.lib.tls import TLS\n"
    code = "class Node(Base): tls = TLS('/nope.pem', '/nope.key')\n"
    exit_code, lines = doctor(pipeline_file(tmp_path, imports + code))
    assert exit_code == 1
    assert found(lines, "error", "/nope.pem")
