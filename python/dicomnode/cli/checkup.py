"""`dicomnode doctor --pipeline FILE.py`: whether a node could run here, before it does.

One line for each thing that is looked at: ok, warning or error, and what helps. Nothing is left
behind, and a node that runs already is not disturbed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from dicomnode.cli.cases import node_runs
from dicomnode.cli.edge import CommandFailed, printable
from dicomnode.cli.pipeline import blaming, pipeline_in
from dicomnode.errors import DicomnodeError, IncorrectlyConfigured
from dicomnode.lib.dimse import Address, echo
from dicomnode.lib.images import codecs, jpeg_has_simd
from dicomnode.server.node import AbstractPipeline
from dicomnode.server.reference import describe
from dicomnode.server.worker import refuse_to_open
from dicomnode.server.workers import try_import
from dicomnode.storage.disk import Disk

# File systems of other machines: fsync, locks or hard links are not what they are on a disk.
_REMOTE = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "lustre", "ncpfs", "nfs", "nfs4",
     "smb3", "smbfs", "virtiofs"}
)  # fmt: skip
_OPEN = "open"
_VOLATILE = frozenset({"ramfs", "tmpfs"})
_SLOW_FLUSH_SECONDS = 0.05
_FEW_DAYS = 30
_FEW_FILES = 2048
# Its socket, what wakes its threads, and the file of a large image.
_FILES_OF_ASSOCIATION = 8
_FEW_INODES = 100_000
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Literal["ok", "warning", "error"]
    told: str


def check_pipeline(where: str) -> int:
    """Print what was found; 1 where there is an error, else 0."""
    has_error = False
    for finding in _findings(where):
        has_error |= finding.level == "error"
        typer.echo(f"{finding.level:8} {printable(finding.told)}")
    return int(has_error)


def _findings(where: str) -> Iterator[Finding]:
    with contextlib.ExitStack() as stack:
        try:
            with _nothing_opens():
                kind = stack.enter_context(pipeline_in(where))
            with blaming(where):
                node = kind(start=False)
        except (CommandFailed, DicomnodeError) as error:
            yield Finding("error", str(error))
            return
        yield Finding("ok", f"{where} defines {kind.__name__}, whose settings are sound")
        for check in (
            _check_work, _check_isolation, _check_port, _check_health_port, _check_tls, _check_folder, _check_log, _check_files,
            _check_codecs, _check_endpoints,
        ):  # fmt: skip
            yield from check(node)


def _check_work(node: AbstractPipeline) -> Iterator[Finding]:
    if not node.input:
        yield Finding("error", "input is empty: every image would be refused; give it an input")
    elif type(node).process is AbstractPipeline.process:
        yield Finding("error", "process() is not defined: every case would fail; define it")
    elif not node.endpoints:
        yield Finding(
            "warning", "endpoints is empty: a case whose process() returns results fails; set it"
        )


def _check_isolation(node: AbstractPipeline) -> Iterator[Finding]:
    if node.isolation != "process" or node.executor is not None:
        return
    # What is wrong is in the finding, and its traceback would be between the lines.
    quiet = logging.Logger("doctor")
    quiet.addHandler(logging.NullHandler())
    try:
        try_import(describe(node), set(node.input), quiet)
    except IncorrectlyConfigured as error:
        yield Finding("error", str(error))
    else:
        yield Finding("ok", f"a worker process can import and make {type(node).__name__}")


@contextlib.contextmanager
def _nothing_opens() -> Iterator[None]:
    """A file that opens its node whenever it is imported is told, and not opened."""
    before = getattr(AbstractPipeline, _OPEN)
    setattr(AbstractPipeline, _OPEN, refuse_to_open)
    try:
        yield
    finally:
        setattr(AbstractPipeline, _OPEN, before)


# Ports


def _check_port(node: AbstractPipeline) -> Iterator[Finding]:
    error = _bind(node.ip, node.port)
    name = f"port {node.port} of {node.ip}"
    if error is None:
        yield Finding("ok", f"{name} is free")
    elif error.errno == errno.EADDRINUSE and _is_running(node):
        yield Finding("ok", f"{name} is used, and a node runs with this root_data_directory")
    else:
        yield Finding("error", _port_trouble(name, error, "port"))
    if node.is_open_to_all:
        yield Finding(
            "warning",
            f"everybody who reaches {name} may send: set ip to one address, allowed_networks, tls "
            "with a ca, or require_calling_aet; or let a firewall decide",
        )


def _check_health_port(node: AbstractPipeline) -> Iterator[Finding]:
    if node.health_port is None:
        return
    error = _bind(node.health_ip, node.health_port)
    name = f"port {node.health_port} of {node.health_ip}, for health,"
    if error is None:
        yield Finding("ok", f"{name} is free")
    elif error.errno == errno.EADDRINUSE and _is_running(node):
        yield Finding("ok", f"{name} is used, and a node runs with this root_data_directory")
    else:
        yield Finding("error", _port_trouble(name, error, "health_port"))


def _check_tls(node: AbstractPipeline) -> Iterator[Finding]:
    if node.tls is None:
        return
    try:
        node.tls.server()
        days = _days_left(Path(node.tls.certificate), Path(node.tls.key))
    except (DicomnodeError, ssl.SSLError) as error:
        yield Finding("error", f"{error}; renew or replace it")
        return
    told = f"the TLS certificate {node.tls.certificate} is valid for {days:.0f} days"
    yield Finding("ok" if days > _FEW_DAYS else "warning", told)
    if Path(node.tls.key).stat().st_mode & 0o077:
        yield Finding("warning", f"{node.tls.key} can be read by others: chmod 600 it")
    if node.tls.ca is None:
        yield Finding("warning", "tls has no ca: every sender is let in, encrypted; set it")


def _days_left(certificate: Path, key: Path) -> float:
    """How long a certificate is still valid; asks it of itself. Raises ssl.SSLError if it is not."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key, password="")
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_side.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    found = client.getpeercert() or {}
    return (ssl.cert_time_to_seconds(str(found["notAfter"])) - time.time()) / 86400


def _bind(ip: str, port: int) -> OSError | None:
    """What keeps a program from listening there."""
    try:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((ip, port))
            one.listen(1)
    except OverflowError:
        return OSError(errno.EINVAL, "a port is a number up to 65535")
    except OSError as error:
        return error
    return None


def _port_trouble(name: str, error: OSError, setting: str) -> str:
    if error.errno == errno.EACCES:
        remedy = (
            f"ports below 1024 need privileges: set {setting} to a higher one, or give the node "
            "CAP_NET_BIND_SERVICE, as the unit in deploy/ does"
        )
    elif error.errno == errno.EADDRINUSE:
        remedy = f"another program uses it: stop that, or set {setting} to another port"
    else:
        remedy = f"it has to be an address of this machine: change it, or {setting}"
    return f"{name} cannot be used: {error.strerror or error}; {remedy}"


# The folder


def _check_folder(node: AbstractPipeline) -> Iterator[Finding]:
    if node.root_data_directory is None:
        yield Finding(
            "warning",
            "root_data_directory is None: images are in memory, and lost when the node ends; set it "
            "to a folder on a local disk",
        )
        return
    root = Path(node.root_data_directory).absolute()
    folder = root
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        yield Finding("error", f"{folder} is no folder: set root_data_directory to one")
        return
    try:
        seconds = _try_folder(folder)
    except OSError as error:
        yield Finding(
            "error",
            f"{folder} cannot keep images: {error.strerror or error}; give the node's user the right "
            "to write there, on a file system with hard links, locks and fsync",
        )
        return
    made = "" if folder == root else ", and the rest of it will be made"
    yield Finding("ok", f"{folder} can be written{made}; fsync takes {1000 * seconds:.1f} ms")
    if seconds > _SLOW_FLUSH_SECONDS:
        yield Finding(
            "warning", "fsync is slow, and each image waits for it: a local SSD takes about 1 ms"
        )
    yield from _check_file_system(folder)
    yield from _check_room(folder, node.limits.free_bytes)
    if _is_running(node):
        yield Finding("ok", f"a node runs with {root} now; a second one needs a folder of its own")


def _try_folder(folder: Path) -> float:
    """Write, flush, link and lock a file there as storage does; how long the flush took."""
    with tempfile.TemporaryDirectory(prefix=".dicomnode-doctor-", dir=folder) as name:
        path = Path(name, "file")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, bytes(512 * 1024))
            start = time.perf_counter()
            os.fsync(descriptor)
            os.link(path, Path(name, "link"))
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            seconds = time.perf_counter() - start
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    return seconds


def _check_file_system(folder: Path) -> Iterator[Finding]:
    kind = file_system_of(folder, Path("/proc/self/mountinfo").read_text("utf-8", "replace"))
    if kind in _REMOTE:
        yield Finding(
            "warning",
            f"{folder} is on {kind}, a file system of another machine: the ledger needs a local "
            "disk; set root_data_directory to one",
        )
    elif kind in _VOLATILE:
        yield Finding(
            "warning", f"{folder} is on {kind}, in memory: a power cut loses it; use a disk"
        )
    elif kind == "overlay":
        yield Finding(
            "warning", f"{folder} is inside a container, and goes with it: mount a volume there"
        )
    else:
        yield Finding("ok", f"{folder} is on {kind or 'an unknown file system'}")


def file_system_of(folder: Path, mounts: str) -> str:
    """The type of the file system of a folder; `mounts` is as /proc/self/mountinfo (proc(5))."""
    real = folder.resolve()
    found, longest = "", -1
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if not separator or len(fields) < 5:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        # The last mount over another one is the one that is seen.
        if (real == point or point in real.parents) and len(point.parts) >= longest:
            found, longest = after.split()[0], len(point.parts)
    return found


def _check_room(folder: Path, wanted: int | None) -> Iterator[Finding]:
    disk = Disk(folder, wanted)
    free, least = disk.free_bytes(), disk.least_free()
    told = (
        f"{free / _GIB:.1f} GiB are free there, and below {least / _GIB:.1f} GiB images are refused "
        "(limits.free_bytes)"
    )
    if free < least:
        yield Finding("error", f"{told}: make room, or set root_data_directory to another disk")
    elif free < least + 10 * _GIB:
        yield Finding("warning", f"{told}: that comes soon; make room")
    else:
        yield Finding("ok", told)
    files = os.statvfs(folder)
    if files.f_files > 0 and files.f_favail < _FEW_INODES:
        yield Finding("warning", f"only {files.f_favail} files can be made there (inodes)")


def _is_running(node: AbstractPipeline) -> bool:
    return node.root_data_directory is not None and node_runs(Path(node.root_data_directory))


# The rest of the machine


def _check_log(node: AbstractPipeline) -> Iterator[Finding]:
    if node.log_path is None:
        return
    folder = Path(node.log_path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if os.access(folder, os.W_OK | os.X_OK) and folder.is_dir():
        yield Finding("ok", f"the log can be written to {node.log_path}")
    else:
        yield Finding(
            "error", f"log_path {node.log_path} cannot be written: set it, or rights in {folder}"
        )


def _check_files(node: AbstractPipeline) -> Iterator[Finding]:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(_FEW_FILES, _FILES_OF_ASSOCIATION * node.limits.associations)
    if 0 <= limit < wanted:
        yield Finding(
            "warning",
            f"a process may have {limit} files open, which many senders use up: raise it to "
            f"{max(wanted, min(most, 65536))} (ulimit -n, or LimitNOFILE= of the service)",
        )
    else:
        yield Finding("ok", f"a process may have {limit} files open")


def _check_codecs(node: AbstractPipeline) -> Iterator[Finding]:
    accepted = {str(uid) for one in node.supported_contexts for uid in one.transfer_syntax or ()}
    rows = [row for row in codecs() if row[0] in accepted]
    missing = [row[1] for row in rows if not row[2]]
    told = f"{len(rows) - len(missing)} compressed transfer syntaxes are accepted and decoded"
    if missing:
        told += f"; accepted, but not decoded: {', '.join(missing)}"
    yield Finding("ok", told)
    if not jpeg_has_simd():
        yield Finding("warning", "JPEG is decoded without SIMD: install nasm and build again")


def _check_endpoints(node: AbstractPipeline) -> Iterator[Finding]:
    """C-ECHO, to all at once: one that is down takes its time."""
    found: dict[Address, Finding] = {}

    def ask(address: Address) -> None:
        start = time.perf_counter()
        try:
            echo(address, node.ae_title)
        except DicomnodeError as error:
            told = f"{error}; is it up, and does it know {node.ae_title!r}?"
            found[address] = Finding("error", told)
        else:
            seconds = time.perf_counter() - start
            found[address] = Finding("ok", f"{address} answers C-ECHO in {seconds:.3f} s")

    _at_once(ask, dict.fromkeys(node.endpoints))
    yield from (found[address] for address in dict.fromkeys(node.endpoints))


def _at_once(job: Callable[[Address], None], addresses: Iterable[Address]) -> None:
    threads = [threading.Thread(target=job, args=(one,), daemon=True) for one in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
