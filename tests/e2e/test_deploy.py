"""The files in deploy/: what they say is what the command understands, and what the node needs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

from tests.e2e.programs import Command, pipeline_file

from dicomnode.lib.dimse import echo
from dicomnode.server.node import AbstractPipeline

DEPLOY = Path(__file__).parents[2] / "deploy"
NODE = """
class Node(Base):
    def process(self, input_data):
        return None
del Base
"""


def unit() -> ConfigParser:
    parser = ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "dicomnode@.service").read_text())
    return parser


def containerfile() -> dict[str, str]:
    """The last of each instruction."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
    return dict(lines)


def test_the_unit_is_one_that_systemd_understands(
    tmp_path: Path, peer: Callable[[str], str]
) -> None:
    analyze = peer("systemd-analyze")
    text = (DEPLOY / "dicomnode@.service").read_text()
    # The command is not installed here.
    file = tmp_path / "dicomnode@.service"
    file.write_text(text.replace("/opt/dicomnode/bin/dicomnode", sys.executable))
    done = subprocess.run([analyze, "verify", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert file.name not in done.stderr, done.stderr


def test_the_unit_gives_the_node_the_time_that_it_needs() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > AbstractPipeline.stop_seconds + 14
    assert service["KillMode"] == "mixed"
    assert service["OOMPolicy"] == "continue"
    assert service["StateDirectory"] == "dicomnode/%i"
    assert "--root /var/lib/dicomnode/%i" in service["ExecStart"]


def test_the_commands_of_unit_and_container_run_and_are_healthy(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, NODE).removesuffix(":Node")
    exec_start = unit()["Service"]["ExecStart"].split()[1:]
    command = json.loads(containerfile()["CMD"])
    assert json.loads(containerfile()["ENTRYPOINT"]) == ["dicomnode"]
    check = json.loads(containerfile()["HEALTHCHECK"].split("CMD", 1)[1])
    for arguments in (exec_start, command):
        told = " ".join(arguments)
        told = re.sub(r"/node/pipeline\.py|/etc/dicomnode/%i\.py", file, told)
        told = re.sub(r"/data\b|/var/lib/dicomnode/%i", str(tmp_path / "data"), told)
        told = told.replace("11112", "0").replace("8080", "0")
        with Command(*told.split()) as node:
            echo(node.address("NODE"))
            if "--health-port" in told:
                port = node.until(r"health is told on .*:(\d+)")
                code = check[2].replace("8080", port)
                assert "/healthz" in code
                subprocess.run([sys.executable, *check[1:2], code], check=True, timeout=60)
            node.process.terminate()
            node.ended()
            assert node.process.returncode == 0
        assert (tmp_path / "data" / ".dicomnode").is_dir()


def test_the_container_does_not_run_as_root_and_is_built_from_the_wheel() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert containerfile()["USER"] == "dicomnode"
    assert text.count("\nFROM ") == 2
    assert "pip wheel" in text and "--no-index" in text
    # Without it podman drops the HEALTHCHECK.
    command = "podman build --format docker -f deploy/Containerfile -t dicomnode ."
    assert command in text and command in (DEPLOY.parent / "docs" / "operations.md").read_text()
