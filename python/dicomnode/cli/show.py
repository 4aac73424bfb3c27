"""`dicomnode show`: a header and a picture of a file, or the series in a folder."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import typer
from numpy.typing import NDArray
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from dicomnode.cli.edge import CommandFailed, counted, printable
from dicomnode.cli.picture import grey, terminal_lines, write_png
from dicomnode.cli.series import Series, find_series, load_paths
from dicomnode.errors import DicomnodeError
from dicomnode.lib.dicom import PIXEL_TAGS
from dicomnode.lib.grinders import volume_grinder
from dicomnode.lib.images import Reading, read_array, read_slices

# Besides every value of VR PN.
_HIDDEN = frozenset(
    {"PatientBirthDate", "PatientBirthTime", "PatientAddress", "PatientTelephoneNumbers"}
)
_BINARY = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN"})
_WIDEST = 100


def show_path(path: Path, png: Path | None, identifiable: bool) -> None:
    """Show a file or a folder; the picture goes to `png` where that is given."""
    datasets = load_paths([path])
    if path.is_dir():
        largest = _show_folder(find_series(datasets))
        dataset = largest[len(largest) // 2]
    else:
        dataset = datasets[0]
        for line in _header_lines(dataset, identifiable):
            typer.echo(line)
    _show_picture(dataset, png)


# Headers


def _header_lines(dataset: Dataset, identifiable: bool) -> Iterator[str]:
    meta = getattr(dataset, "file_meta", None) or Dataset()
    for element in [*meta, *dataset]:
        tag = element.tag
        name = keyword_for_tag(tag) or ("private" if tag.is_private else "unknown")
        value = printable(_value(element, name, identifiable))
        if len(value) > 72:
            value = f"{value[:69]}..."
        yield f"({tag.group:04X},{tag.element:04X}) {element.VR} {name:32} {value}".rstrip()


def _value(element: DataElement, name: str, identifiable: bool) -> str:
    value: Any = element.value
    if value is None or value == "":
        return ""
    if not identifiable and (element.VR == "PN" or name in _HIDDEN):
        return "***"
    if element.VR == "SQ":
        return counted(len(value), "item")
    if element.VR in _BINARY or isinstance(value, bytes):
        return counted(len(value), "byte")
    if isinstance(value, MultiValue | list | tuple):
        return "\\".join(map(str, value))
    return str(value)


# Series


def _show_folder(found: list[Series]) -> list[Dataset]:
    """A line for each series; the images of the largest in their order."""
    largest: list[Dataset] = []
    voxels = -1
    for series in found:
        told, ordered = _look_at(series)
        matrix = f"{series.columns} x {series.rows}"
        typer.echo(f"{series.name}: {counted(len(series.datasets), 'image')} of {matrix}, {told}")
        size = len(series.datasets) * series.rows * series.columns
        if size > voxels:
            largest, voxels = ordered, size
    return largest


def _look_at(series: Series) -> tuple[str, list[Dataset]]:
    """Spacing or why there is none, and the images in the best order there is."""
    try:
        volume = volume_grinder(series.datasets)
    except DicomnodeError as error:
        ordered = sorted(series.datasets, key=lambda one: one.get("InstanceNumber") or 0)
        return f"no volume: {error}", ordered
    by_uid = {str(one.SOPInstanceUID): one for one in series.datasets}
    spacing = " x ".join(f"{length:.4g}" for length in volume.spacing_mm)
    return f"{spacing} mm (slice x row x column)", [by_uid[uid] for uid in volume.sop_instance_uids]


# Pictures


def _show_picture(dataset: Dataset, png: Path | None) -> None:
    if not any(tag in dataset for tag in PIXEL_TAGS):
        if png is not None:
            raise CommandFailed(
                f"{dataset.get('SOPInstanceUID', 'the object')} has no Pixel Data, so there is no "
                "picture of it"
            )
        return
    if png is not None and png.exists() and not _is_png(png):
        raise CommandFailed(f"{png} is there and is no PNG: it is not overwritten")
    picture, aspect = _picture(dataset)
    if png is not None:
        write_png(picture, png, aspect)
        typer.echo(f"picture: {png}")
        return
    columns = min(_WIDEST, shutil.get_terminal_size().columns)
    for line in terminal_lines(picture, columns, aspect, colour=sys.stdout.isatty()):
        typer.echo(line)


def _picture(dataset: Dataset) -> tuple[NDArray[numpy.uint8], float]:
    """The (middle) frame for display, and the height of its pixels over their width."""
    try:
        slices, _ = read_slices([dataset])
        array, _ = read_array([slices[len(slices) // 2]], Reading(color="palette"))
    except (DicomnodeError, IndexError) as error:
        raise CommandFailed(f"no picture of it: {error}") from error
    (pixels,) = array
    spacing = dataset.get("PixelSpacing")
    aspect = float(spacing[0]) / float(spacing[1]) if spacing and float(spacing[1]) > 0 else 1.0
    if pixels.ndim == 3:
        colours = pixels[..., :3]
        if colours.dtype == numpy.uint16:
            colours = colours >> 8
        return colours.astype(numpy.uint8), aspect
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    return grey(pixels, _window(dataset), inverted), aspect


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _window(dataset: Dataset) -> tuple[float, float] | None:
    """Black and white as WindowCenter and WindowWidth tell (the first pair)."""
    centre, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 1:
        return None
    return centre - width / 2, centre + width / 2


def _first(value: Any) -> float | None:
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if value else None
    return None if value is None or value == "" else float(value)
