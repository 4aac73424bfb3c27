"""`dicomnode demo`: two real nodes, real associations, and what came of each series."""

import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import typer
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from dicomnode.cli.edge import CommandFailed, counted
from dicomnode.cli.peer import send_datasets
from dicomnode.cli.picture import beside, grey, write_png
from dicomnode.cli.series import Series, find_series, load_paths
from dicomnode.errors import CouldNotCompleteDIMSEMessage
from dicomnode.lib.dicom import load, safe_name
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, volume_grinder
from dicomnode.lib.series import derive_series
from dicomnode.lib.volume import Volume
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.storage.ledger import Case, State
from dicomnode.testing import StoringNode, address_of, make_series, write_series

# Uncompressed CT, RLE compressed MR, JPEG 2000 compressed CT.
_FROM_PYDICOM = ("CT_small.dcm", "MR_small_RLE.dcm", "693_J2KI.dcm")
_SERIES_INSTANCE_UID = 0x0020000E
_LONGEST_SECONDS = 3600.0


@dataclass
class _Ground:
    """What the input gives to process(), with the moments that the demonstration tells."""

    ready: float
    seconds: float
    volume: Volume
    images: list[Dataset]


@dataclass
class _Step:
    """What process() did with one series."""

    ground: _Ground
    shape: tuple[int, ...]
    told: str
    before: NDArray[Any]
    seconds: float
    result_series_uid: str


class _Images(AbstractInput):
    image_grinder = many_meta_grinder(volume_grinder, list_grinder)

    def validate(self) -> bool:
        # The demonstration sends a whole series over one association.
        return self.images > 0

    def get_data(self) -> _Ground:
        start = time.perf_counter()
        volume, images = super().get_data()
        return _Ground(start, time.perf_counter() - start, volume, images)


class _Edges(AbstractPipeline):
    """Computes how steep the values are in each slice: edges are light, even tissue is dark."""

    ae_title = "EDGES"
    input = {"images": _Images}
    patient_identifier_tag = _SERIES_INSTANCE_UID

    def __init__(self, start: bool = True) -> None:
        self.steps: dict[str, _Step] = {}
        super().__init__(start)

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        ground: _Ground = input_data["images"]
        array = ground.volume.array
        middle = len(array) // 2
        before = array[middle].copy()
        told = (
            f"{' x '.join(map(str, array.shape))} {array.dtype}, "
            f"{array.min():g} to {array.max():g}, spacing "
            f"{' x '.join(f'{length:.4g}' for length in ground.volume.spacing_mm)} mm"
        )
        start = time.perf_counter()
        for image in array:
            image[:] = numpy.hypot(*numpy.gradient(image))
        results = list(derive_series(array, ground.images, series_description="Edges"))
        seconds = time.perf_counter() - start
        self.steps[str(ground.images[0].SeriesInstanceUID)] = _Step(
            ground, array.shape, told, before, seconds, str(results[0].SeriesInstanceUID)
        )
        return results


class _Store(StoringNode):
    """One folder for each series that arrives."""

    patient_identifier_tag = _SERIES_INSTANCE_UID


def show_demo(data: Path | None, output: Path, slices: int) -> None:
    """Send every series to the example node, and tell what happened.

    Without `data` these are images of pydicom and a generated CT series of so many slices. Raises
    CommandFailed where nothing came back for any series.
    """
    with _series_to_send(data, slices) as found, _nodes(output) as (node, store):
        worked = 0
        for number, (name, series) in enumerate(found, 1):
            typer.echo(f"\n{number}. {name}")
            try:
                _show_series(node, store, series, output / f"{number:02}-{_plain(name)}")
                worked += 1
            except (CommandFailed, CouldNotCompleteDIMSEMessage) as error:
                typer.echo(f"   not processed  {error}")
    typer.echo(f"\n{worked} of {len(found)} series came back; all of it lies in {output}")
    if not worked:
        raise CommandFailed("no series came back")


@contextmanager
def _series_to_send(data: Path | None, slices: int) -> Iterator[list[tuple[str, Series]]]:
    if data is not None:
        yield [(series.name, series) for series in find_series(load_paths([data]))]
        return
    named = []
    for file in _FROM_PYDICOM:
        path = get_testdata_file(file, download=False)
        if path is not None:
            named += [(f"{file} of pydicom", series) for series in find_series(load(str(path)))]
    with tempfile.TemporaryDirectory() as folder:
        write_series(make_series(slices, 512, 512), Path(folder))
        named += [(f"generated CT, {slices} slices", one) for one in find_series(load(folder))]
        yield named


@contextmanager
def _nodes(output: Path) -> Iterator[tuple[_Edges, _Store]]:
    """The two nodes on free ports, with their data and their logs below `output`."""
    store, node = _Store(start=False), _Edges(start=False)
    for one, name in ((store, "store"), (node, "node")):
        one.ip, one.port = "127.0.0.1", 0
        one.root_data_directory = output / name
        one.log_path = output / f"{name}.log"
    with store:
        node.endpoints = [address_of(store)]
        with node:
            typer.echo(f"{address_of(node)} computes edges, keeps cases in {output / 'node'}")
            typer.echo(f"{address_of(store)} stores results in {output / 'store'}")
            yield node, store


def _show_series(node: _Edges, store: _Store, series: Series, folder: Path) -> None:
    start = time.perf_counter()
    responses = send_datasets(address_of(node), series.datasets, "DEMO")
    sent = time.perf_counter()
    refused = [response for response in responses if not response.is_stored]
    if refused:
        raise CommandFailed(
            f"{len(refused)} of {len(responses)} objects were refused, the first "
            f"{refused[0].sop_instance_uid}: {refused[0].comment}"
        )
    count = len(responses)
    _tell(
        "sent",
        f"{counted(count, 'image')} in {sent - start:.3f} s, {count / (sent - start):.0f} images/s",
    )
    case = _finished_case(node, series.uid)
    if case.state is State.FAILED:
        raise CommandFailed(f"case {case.id} is kept: {case.error.strip().splitlines()[-1]}")
    delivered = time.perf_counter()
    step = node.steps.pop(series.uid)
    _tell("case ready", f"case {case.id}, {max(0.0, step.ground.ready - sent):.3f} s after that")
    _tell("volume", f"{step.told}, in {step.ground.seconds:.3f} s")
    for warning in step.ground.volume.warnings:
        _tell("", warning)
    _tell("process", f"{step.seconds:.3f} s")
    expected = step.shape[0]
    arrived = [one for one in store.received if one.SeriesInstanceUID == step.result_series_uid]
    store.received.clear()
    results = Path(str(store.root_data_directory), safe_name(step.result_series_uid))
    _tell(
        "delivered",
        f"{len(arrived)} of {expected} instances, {delivered - start:.3f} s after the start",
    )
    _tell("results", str(results))
    _draw(step, volume_grinder(load(results)), folder)
    _tell("picture", str(folder / "before-after.png"))


def _plain(name: str) -> str:
    """A short folder name without blanks or anything that a shell would ask about."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60] or "series"


def _tell(what: str, value: str) -> None:
    typer.echo(f"   {what:14} {value}")


def _finished_case(node: _Edges, identifier: str) -> Case:
    """The newest case of an identifier, once it is DONE or FAILED."""

    def newest() -> Case:
        return [case for case in node.cases() if case.identifier == identifier][-1]

    if not node.wait(lambda: newest().state in (State.DONE, State.FAILED), _LONGEST_SECONDS):
        raise CommandFailed(f"nothing came back in {_LONGEST_SECONDS:.0f} s")
    return newest()


def _draw(step: _Step, after: Volume, folder: Path) -> None:
    """The middle slice as it was sent and as it came back."""
    aspect = after.spacing_mm[1] / after.spacing_mm[2]
    left, right = grey(step.before), grey(after.array[len(after.array) // 2])
    write_png(left, folder / "before.png", aspect)
    write_png(right, folder / "after.png", aspect)
    write_png(beside(left, right), folder / "before-after.png", aspect)
