"""The unit in deploy/ under a systemd of its own: it starts, receives, is watched, restarts and drains."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread
from tests.e2e.booted import SERVICE, Booted

from dicomnode.testing import make_series, write_series

IMAGES = 4
PIPELINE = """
import os, time
from pathlib import Path
from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

class Series(AbstractInput):
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)
    def validate(self):
        return self.images >= 4

class PlusOne(AbstractPipeline):
    ip, port, ae_title = "127.0.0.1", 104, "NODE"
    input = {"series": Series}
    endpoints = [Address("127.0.0.1", 11113, "STORESCP")]
    isolation = "process"

    def process(self, input_data):
        images, array = input_data["series"]
        if images[0].PatientID.startswith("SLOW"):
            time.sleep(2)
        assert os.getuid() != 0 and not os.access("/etc/dicomnode", os.W_OK)
        return derive_series(array + 1, images)
"""
GROUND, DONE = r"case \d+ ground", r"case \d+ is done"
#: So that the test does not take minutes.
FASTER = "[Service]\\nWatchdogSec=3\\nRestartSec=1\\n"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    if os.getuid() != 0:
        pytest.skip("only root may start a systemd in namespaces of its own")
    booted = Booted(tmp_path_factory.mktemp("booted"), PIPELINE, FASTER)
    try:
        booted.open()
    except OSError as error:
        pytest.skip(f"no systemd in namespaces of its own: {error}")
    with closing(booted):
        yield booted


class Site:
    """A sender and an endpoint in the network of that machine."""

    def __init__(self, machine: Booted, peer: Callable[[str], str], folder: Path) -> None:
        self._prefix = machine.prefix(network_only=True)
        self._storescu, self._storescp = peer("storescu"), peer("storescp")
        self._folder = folder
        self._kept = folder / "kept"

    @contextmanager
    def endpoint(self) -> Iterator[None]:
        """Where results are kept."""
        self._kept.mkdir()
        command = [self._storescp, "-uf", "-aet", "STORESCP", "-od", str(self._kept), "11113"]
        with subprocess.Popen([*self._prefix, *command]) as process:
            try:
                yield
            finally:
                process.kill()

    def send(self, name: str) -> None:
        """Send a series; all of it is acknowledged."""
        files = write_series(make_series(IMAGES, 16, 16, patient_id=name), self._folder / name)
        subprocess.run(
            [*self._prefix, self._storescu, "-aec", "NODE", "127.0.0.1", "104", *map(str, files)],
            check=True,
            timeout=60,
        )

    def results(self, name: str) -> int:
        """How many results of a patient have arrived; one that came twice would have two files."""
        patients = (dcmread(file, force=True).PatientID for file in self._kept.iterdir())
        return sum(patient == name for patient in patients)


@pytest.fixture
def site(machine: Booted, peer: Callable[[str], str], tmp_path: Path) -> Iterator[Site]:
    site = Site(machine, peer, tmp_path)
    with site.endpoint():
        # It returns after READY=1.
        machine.run("systemctl", "reset-failed", SERVICE)
        machine.run("systemctl", "start", SERVICE)
        assert machine.show("ActiveState") == "active", machine.journal()
        yield site
        machine.run("systemctl", "stop", SERVICE)


def test_the_service_receives_processes_and_sends_under_all_that_the_unit_forbids(
    machine: Booted, site: Site
) -> None:
    site.send("PLAIN")
    machine.until(DONE)
    assert site.results("PLAIN") == IMAGES
    shown = machine.run("stat", "--format", "%U %a", "/var/lib/dicomnode/plus_one")
    assert shown == "dicomnode 700\n"
    status = machine.run("cat", f"/proc/{machine.show('MainPID')}/status")
    assert "Seccomp:\t2\n" in status and "NoNewPrivs:\t1\n" in status
    # CAP_NET_BIND_SERVICE, for port 104, and no other.
    assert "CapEff:\t0000000000000400\n" in status and "CapBnd:\t0000000000000400\n" in status


def test_a_killed_service_is_started_again_and_finishes_what_it_acknowledged(
    machine: Booted, site: Site
) -> None:
    done, process = machine.said(DONE), machine.show("MainPID")
    site.send("SLOW-1")
    machine.run("kill", "-KILL", process)
    machine.until(DONE, done + 1)
    assert machine.show("MainPID") != process and machine.show("NRestarts") == "1"
    assert site.results("SLOW-1") == IMAGES


def test_a_service_that_hangs_is_started_again(machine: Booted, site: Site) -> None:
    starts = machine.said("listens on")
    machine.run("kill", "-STOP", machine.show("MainPID"))
    machine.until("Watchdog timeout")
    machine.until("listens on", starts + 1)
    done = machine.said(DONE)
    site.send("AFTER")
    machine.until(DONE, done + 1)
    assert site.results("AFTER") == IMAGES


def test_p9_the_service_finishes_what_it_processes_when_it_is_stopped(
    machine: Booted, site: Site
) -> None:
    ground, done = machine.said(GROUND), machine.said(DONE)
    site.send("SLOW-2")
    machine.until(GROUND, ground + 1)
    machine.run("systemctl", "stop", SERVICE)
    assert machine.show("Result") == "success" and machine.show("ExecMainStatus") == "0"
    machine.run("systemctl", "start", SERVICE)
    # Before the stop or after the start, but once.
    machine.until(DONE, done + 1)
    assert site.results("SLOW-2") == IMAGES
    assert machine.said(GROUND) == ground + 1
