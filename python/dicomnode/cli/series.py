"""The series among files: which there are, before any of them is read as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from dicomnode.cli.edge import CommandFailed, printable
from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import Header, LazyDataset, header_element, load, scan


@dataclass
class Series:
    """Objects with the same SeriesInstanceUID, in the order of their files."""

    uid: str
    modality: str
    description: str
    rows: int
    columns: int
    datasets: list[Dataset] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Modality and description, for people."""
        return " ".join(part for part in (self.modality, self.description) if part) or "no name"


def load_paths(paths: Iterable[Path]) -> list[Dataset]:
    """The lazy datasets of files and folders. Raises CommandFailed where there is none."""
    given = list(paths)
    datasets: list[Dataset] = []
    for path in given:
        try:
            datasets += load(path)
        except InvalidDicom as error:
            raise CommandFailed(f"{path}: {error}") from error
    if not datasets:
        raise CommandFailed(f"no DICOM object in {', '.join(map(str, given))}")
    return datasets


def find_series(datasets: Iterable[Dataset]) -> list[Series]:
    """The series among what `dicomnode.lib.dicom.load` gave, in the order of their first file."""
    found: dict[str, Series] = {}
    for dataset in datasets:
        if not isinstance(dataset, LazyDataset):
            continue
        header = scan(dataset.source)
        uid = header.text(0x0020000E)
        if uid not in found:
            found[uid] = Series(
                uid,
                _text(header, 0x00080060),
                _text(header, 0x0008103E),
                _number(header, 0x00280010),
                _number(header, 0x00280011),
            )
        found[uid].datasets.append(dataset)
    return list(found.values())


def _text(header: Header, tag: int) -> str:
    try:
        element = header_element(header, tag)
    except InvalidDicom:
        return "?"
    value = None if element is None else element.value
    return "" if value is None else printable(str(value))


def _number(header: Header, tag: int) -> int:
    text = _text(header, tag)
    return int(text) if text.isdecimal() else 0
