"""Fixtures shared by all tests: real peers, real data, and pieces of series."""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from tests.e2e.programs import serving

from dicomnode.lib.dimse import Address

_PACKAGES = {
    "strace": "strace",
    "dciodvfy": "dicom3tools",
    "openssl": "openssl",
    "systemd-analyze": "systemd",
    "dcm2niix": "dcm2niix",
}

#: What CI may lack, too: rights that a machine in a container does not have, and data.
_MAY_BE_SKIPPED = (
    "only root may",
    "no control group can be made",
    "no systemd in namespaces of its own",
    "DICOMNODE_TEST_DATA is not set",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI has installed all peers, a test that is skipped for the lack of something has failed."""
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and "DICOMNODE_REQUIRE_PEERS" in os.environ
    ):
        reason = str(report.longrepr)
        if not any(text in reason for text in _MAY_BE_SKIPPED):
            report.outcome, report.longrepr = "failed", f"skipped in CI: {reason}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A thread that a test left behind, such as a pynetdicom client's, does not keep the run from ending."""
    own = {threading.main_thread(), threading.current_thread()}
    end = time.monotonic() + 10
    while left := [one for one in threading.enumerate() if one not in own and not one.daemon]:
        if time.monotonic() > end:
            names = ", ".join(sorted(one.name for one in left))
            print(f"\nthreads that never end: {names}", file=sys.stderr)
            session.config.add_cleanup(lambda: _exit(int(session.exitstatus)))
            return
        time.sleep(0.1)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def peer() -> Callable[[str], str]:
    """The path of a program that we did not write; the test is skipped where it is missing.

    pynetdicom installs scripts named like dcmtk's into a virtual environment: those are passed by.
    """
    own = Path(sys.prefix, "bin")
    folders = [one for one in os.environ["PATH"].split(os.pathsep) if Path(one) != own]

    def find(name: str) -> str:
        found = shutil.which(name, path=os.pathsep.join(["/usr/bin", *folders]))
        if found is None:
            pytest.skip(f"{name} is missing (Debian package {_PACKAGES.get(name, 'dcmtk')})")
        return found

    return find


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real series; tests with it are skipped where it is not given."""
    folder = os.environ.get("DICOMNODE_TEST_DATA", "")
    if not folder:
        pytest.skip("DICOMNODE_TEST_DATA is not set: no real series")
    return Path(folder)


@pytest.fixture(scope="session")
def ct_folder(real_data: Path) -> Path:
    """140 real CT slices and one object that is no image."""
    return real_data / "ct-phantom-140"


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def storescp(
    peer: Callable[[str], str], tmp_path: Path, free_port: int
) -> Iterator[tuple[Address, Path]]:
    """dcmtk's storescp as an endpoint: its address, and the folder where it writes."""
    folder = tmp_path / "storescp"
    folder.mkdir()
    command = [peer("storescp"), "+B", "-aet", "STORESCP", "-od", str(folder), str(free_port)]
    address = Address("127.0.0.1", free_port, "STORESCP")
    with serving(command, address):
        yield address, folder
