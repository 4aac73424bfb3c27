"""`dicomnode send` and `dicomnode echo`: this machine as the sender."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from pydicom.dataset import Dataset

from dicomnode.cli.edge import CommandFailed, counted
from dicomnode.cli.series import load_paths
from dicomnode.lib.dicom import LazyDataset, Source
from dicomnode.lib.dimse import Address, Response, echo, send

_MEANINGS = {
    0x0000: "stored",
    0x0111: "other content under this UID, or there already",
    0x0122: "SOP class or transfer syntax not accepted",
    0xA700: "out of resources",
    0xC000: "cannot be understood, or cannot be encoded",
    0xB000: "stored, with coerced elements",
    0xB006: "refused by filter and inputs, or stored with elements left out",
    0xB007: "no patient identifier, or stored though it does not match its SOP class",
}


def echo_peer(host: str, port: int, ae_title: str, calling: str) -> None:
    """C-ECHO, and how long it took together with its association."""
    address = Address(host, port, ae_title)
    start = time.perf_counter()
    echo(address, calling)
    typer.echo(f"{address} answered in {time.perf_counter() - start:.3f} s")


def send_files(paths: Sequence[Path], host: str, port: int, ae_title: str, calling: str) -> None:
    """C-STORE all files: a progress bar meanwhile, then how many had which answer."""
    address = Address(host, port, ae_title)
    datasets = load_paths(paths)
    statuses: Counter[int] = Counter()
    start = time.perf_counter()
    with typer.progressbar(length=len(datasets), label=f"to {address}") as bar:

        def count(response: Response) -> None:
            statuses[response.status] += 1
            bar.update(1)

        try:
            responses = send_datasets(address, datasets, calling, count)
        finally:
            seconds = time.perf_counter() - start
            bar.render_finish()
            for status, number in sorted(statuses.items()):
                typer.echo(f"{number:6} x 0x{status:04X}  {_MEANINGS.get(status, 'refused')}")
    typer.echo(
        f"{counted(len(responses), 'object')} in {seconds:.2f} s: {len(responses) / seconds:.1f}/s"
    )
    refused = [response for response in responses if not response.is_stored]
    if refused:
        first = refused[0]
        raise CommandFailed(
            f"{len(refused)} of {len(responses)} objects were not stored, the first "
            f"{first.sop_instance_uid} with status 0x{first.status:04X} {first.comment}"
        )


def send_datasets(
    address: Address,
    datasets: Sequence[Dataset],
    calling: str,
    on_response: Callable[[Response], None] | None = None,
) -> list[Response]:
    """Send what `load` gave, each as it is in its file, one in memory at a time."""
    return send(address, datasets, calling, on_response=on_response)


def source_of(dataset: Dataset) -> Source:
    """The file or the bytes of a dataset that `load` gave."""
    if not isinstance(dataset, LazyDataset):
        raise TypeError(f"{type(dataset).__name__} has no source")
    return dataset.source
