"""How many images per second does a sender send, and what do they cost it?

The receiver is dcmtk's storescp, without Nagle's algorithm, which writes each image to a file. The clock
of dcmtk's senders runs from the request for the association to the release, by their own log; that of the
senders in Python around the call, which reads the files too. What arrived is counted.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.receive import LOG, Storescp, environment, program
from benchmarks.series import paths_of
from benchmarks.timing import Row, Table, scratch

#: Ours first.
SENDERS = (
    "dicomnode",
    "dcmsend, TCP_NODELAY=1",
    "storescu, TCP_NODELAY=1",
    "pynetdicom, TCP_NODELAY",
)


def answer(title: str, folder: Path, repeats: int, *options: str) -> Table | None:
    """Send a folder to storescp with these options by every sender, in turn; None without dcmtk."""
    if any(program(name) is None for name in ("storescp", "dcmsend", "storescu")):
        return None
    images = len(paths_of(folder))
    results: dict[str, list[tuple[float, float]]] = {}
    wrong: dict[str, str] = {}
    for _ in range(repeats):
        for name in SENDERS:
            if name in wrong:
                continue
            seconds, cpu, count = _run(name, folder, options)
            if count != images or not seconds:
                wrong[name] = f"{count} of {images} arrived, not all were answered"
            results.setdefault(name, []).append((seconds, cpu))
    rows = []
    for name in SENDERS:
        if name in wrong:
            rows.append(Row(name, wrong=wrong[name]))
            continue
        seconds_all, cpu_all = zip(*results[name], strict=True)
        rate = f"{images / statistics.median(seconds_all):.0f}"
        cost = f"{1000 * statistics.median(cpu_all) / images:.2f}"
        rows.append(Row(name, seconds_all, None, (rate, cost)))
    return Table(title, tuple(rows), ("images/s", "CPU ms/image"))


def _run(name: str, folder: Path, options: Sequence[str]) -> tuple[float, float, int]:
    """Seconds and CPU seconds of the sender, and how many images arrived."""
    place = scratch()
    target = place / "received"
    target.mkdir()
    receiver = Storescp("storescp", *options, no_delay=True)
    with receiver.running(target) as (process, port):
        kind = name.partition(",")[0]
        if kind in ("dicomnode", "pynetdicom"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.send", kind, str(port), str(folder)],
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            # pynetdicom may end the association before all images were answered.
            seconds, cpu = map(float, done.stdout.split() or (0.0, 0.0))
        else:
            seconds, cpu = _dcmtk(kind, port, folder, place)
        count = receiver.count(process, target)
    return seconds, cpu, count


def _dcmtk(name: str, port: int, folder: Path, place: Path) -> tuple[float, float]:
    sender = program(name)
    assert sender is not None
    config = place / "log.cfg"
    config.write_text(LOG)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sender, "-lc", str(config), "127.0.0.1", str(port), *map(str, paths_of(folder))],
        env=environment(no_delay=True),
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    clocks = [
        sum(
            float(part) * unit
            for part, unit in zip(line[:12].split(":"), (3600, 60, 1), strict=True)
        )
        for line in done.stderr.splitlines()
        if line[13:].lower().startswith(("requesting association", "releasing association"))
    ]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (clocks[-1] - clocks[0]) % 86400, cpu


def _ours(port: int, folder: Path) -> None:
    from dicomnode.lib.dicom import load
    from dicomnode.lib.dimse import Address, send

    answers = send(Address("127.0.0.1", port, "STORESCP"), load(folder))
    assert all(one.is_stored for one in answers)


def _pynetdicom(port: int, folder: Path) -> None:
    import socket

    from pydicom import dcmread
    from pynetdicom import AE, evt

    paths = paths_of(folder)
    first = dcmread(paths[0], stop_before_pixels=True)
    ae = AE()
    ae.maximum_pdu_size = 131072
    ae.add_requested_context(first.SOPClassUID, first.file_meta.TransferSyntaxUID)

    def tune(event: evt.Event) -> None:
        client = event.assoc.dul.socket.socket
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    association = ae.associate("127.0.0.1", port, evt_handlers=[(evt.EVT_CONN_OPEN, tune)])
    for path in paths:
        assert association.send_c_store(path).Status == 0
    association.release()


def main(kind: str, port: str, folder: str) -> None:
    """One sender in a process of its own: prints seconds and CPU seconds."""
    send = {"dicomnode": _ours, "pynetdicom": _pynetdicom}[kind]
    # What is imported first is not part of sending.
    import pynetdicom

    import dicomnode.lib.dimse

    assert pynetdicom.__name__ and dicomnode.lib.dimse.__name__
    start, cpu = time.perf_counter(), time.process_time()
    send(int(port), Path(folder))
    print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
    # Threads that pynetdicom leaves do not count.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
