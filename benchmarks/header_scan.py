"""How long do ten attributes of every file take?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom

from benchmarks import floor
from benchmarks.series import along_normal, paths_of
from benchmarks.timing import Peer
from dicomnode.lib.dicom import header_element, load, scan
from dicomnode.lib.images import read_slices

TITLE = "Ten attributes of each file, from files"

KEYWORDS = (
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "InstanceNumber",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
)
TAGS = tuple(pydicom.tag.Tag(keyword) for keyword in KEYWORDS)

# One tuple for each file, in the order of the names.
Values = list[tuple[Any, ...]]


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    paths = [str(path) for path in paths_of(folder)]
    datasets = load(folder)
    found = [
        Peer("dicomnode read_slices(load(folder)), ten values", lambda: _slices(load(folder))),
        Peer("dicomnode read_slices(datasets), ten values", lambda: _slices(datasets)),
        Peer("dicomnode scan + header_element, ten values", lambda: _scan(paths)),
        Peer("dicomnode load(folder), then as pydicom datasets", lambda: _lazy(folder)),
        *_dicomsdl(paths),
        Peer("pydicom specific_tags, no pixels", lambda: _pydicom(paths, list(KEYWORDS))),
        Peer("pydicom whole header, no pixels", lambda: _pydicom(paths, None)),
        Peer("pydicom whole file", lambda: _pydicom(paths, None, pixels=True)),
        *_simpleitk(folder),
    ]
    bound = floor.heads(paths_of(folder))
    if bound is not None:
        found.append(Peer("floor: C, open, read 16 KiB, close", bound, checked=False))
    return found


def reference(folder: Path) -> Values:
    """By pydicom."""
    return _pydicom([str(path) for path in paths_of(folder)], None)


def same(result: Any, reference: Values) -> bool:
    """Equal values, or for what only sorts file names the right order."""
    if result and isinstance(result[0], str):
        keys = [along_normal(list(row[7]), list(row[6])) for row in reference]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        names = sorted(result)
        return bool([names[k] for k in order] == result)
    return bool(result == reference)


def _slices(datasets: Any) -> Values:
    slices, _ = read_slices(datasets)
    rows: Values = []
    for item in slices:
        image: Any = item.header
        rows.append(
            (
                image.sop_instance_uid,
                image.series_instance_uid,
                image.modality,
                image.instance_number,
                image.rows,
                image.columns,
                image.position,
                image.orientation,
                image.pixel_spacing,
                image.slope,
            )
        )
    return rows


def _scan(paths: list[str]) -> Values:
    rows = []
    for path in paths:
        header = scan(path)
        elements = [header_element(header, int(tag)) for tag in TAGS]
        rows.append(_plain([None if one is None else one.value for one in elements]))
    return rows


def _lazy(folder: Path) -> Values:
    return [_plain([dataset[tag].value for tag in TAGS]) for dataset in load(folder)]


def _pydicom(paths: list[str], tags: list[str] | None, pixels: bool = False) -> Values:
    rows = []
    for path in paths:
        dataset = pydicom.dcmread(path, specific_tags=tags, stop_before_pixels=not pixels)
        rows.append(_plain([dataset[tag].value for tag in TAGS]))
    return rows


def _dicomsdl(paths: list[str]) -> list[Peer]:
    try:
        import dicomsdl
    except ImportError:
        return []

    def run(load_until: int) -> Values:
        rows = []
        for path in paths:
            dataset = dicomsdl.open(path, load_until)
            rows.append(_plain(dataset.getValues(list(KEYWORDS))))
        return rows

    return [
        Peer("dicomsdl, ten values, stops before pixels", lambda: run(0x7FDFFFFF)),
        Peer("dicomsdl, ten values", lambda: run(0xFFFFFFFF)),
    ]


def _simpleitk(folder: Path) -> list[Peer]:
    try:
        import SimpleITK
    except ImportError:
        return []
    names: Callable[[str], tuple[str, ...]] = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames
    return [Peer("SimpleITK GetGDCMSeriesFileNames (order only)", lambda: list(names(str(folder))))]


def _plain(values: list[Any]) -> tuple[Any, ...]:
    """Texts, integers, floats and tuples of floats, so that results can be compared."""
    uid, series, modality, number, rows, columns, position, orientation, spacing, slope = values
    return (
        str(uid),
        str(series),
        str(modality),
        int(number),
        int(rows),
        int(columns),
        tuple(map(float, position)),
        tuple(map(float, orientation)),
        tuple(map(float, spacing)),
        float(slope),
    )
