"""How many images there are to be, as their headers tell it.

Solves that `validate` cannot know it: DICOM has no sign that a series is complete, but many scanners
and archives write a count into each image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from pydicom.dataset import Dataset

from dicomnode import _core
from dicomnode.lib.dicom import to_scan
from dicomnode.lib.images import Slice
from dicomnode.lib.splits import element_value

#: The tag of an attribute that counts, or a function of an image that does.
Expected: TypeAlias = int | Callable[[Dataset], int | None]

_STUDY, _SERIES, _ACQUISITION, _CONCATENATION = 0x0020000D, 0x0020000E, 0x00200012, 0x00209161
# What an attribute counts the images of, where that is not their series.
_COUNTED_IN = {
    0x00201208: (_STUDY,),  # NumberOfStudyRelatedInstances
    0x00201002: (_SERIES, _ACQUISITION),  # ImagesInAcquisition
    0x00209163: (_CONCATENATION,),  # InConcatenationTotalNumber
}
_MOST_NAMED = 3


def missing_images(datasets: Iterable[Dataset], expected: Expected) -> tuple[str, bool]:
    """What is missing, empty where nothing is, and whether the headers tell how many there are.

    An attribute counts the images of a series; those of a study, an acquisition or a concatenation
    where it is about these. The greatest number among them counts. A function is asked of the first
    image of each series. Where none tells a number above zero, nothing is missing.

    Raises InvalidDicom for a header that cannot be understood.
    """
    groups = _COUNTED_IN.get(expected, (_SERIES,)) if isinstance(expected, int) else (_SERIES,)
    tags = (*groups, expected) if isinstance(expected, int) else groups
    have: dict[tuple[Any, ...], int] = {}
    told: dict[tuple[Any, ...], int] = {}
    for dataset, values in _values(list(datasets), tags):
        group = values[: len(groups)]
        if isinstance(expected, int):
            count = values[-1]
        else:
            count = None if group in have else expected(dataset)
        have[group] = have.get(group, 0) + 1
        if isinstance(count, int | float) and count > told.get(group, 0):
            told[group] = int(count)
    lacking = [
        f"{have[group]} of {count} images of {group[-1] if len(group) == 1 else group[0]} are here"
        for group, count in told.items()
        if have[group] < count
    ]
    more = len(lacking) - _MOST_NAMED
    text = ", ".join(lacking[:_MOST_NAMED]) + (f", and {more} more" if more > 0 else "")
    return text, bool(have) and len(told) == len(have)


def series_of(datasets: Iterable[Dataset]) -> list[str]:
    """The SeriesInstanceUID of each dataset, empty where it has none."""
    return [str(values[0] or "") for _, values in _values(list(datasets), (_SERIES,))]


def _values(
    datasets: Sequence[Dataset], tags: tuple[int, ...]
) -> Iterator[tuple[Dataset, tuple[Any, ...]]]:
    """Each dataset with its values; all that are untouched are scanned at once, in parallel."""
    sources = [to_scan(dataset, tags) for dataset in datasets]
    scanned = iter(_core.scan_images([one for one in sources if one is not None], tags))
    for dataset, source in zip(datasets, sources, strict=True):
        if source is None:
            yield dataset, tuple(dataset.get(tag) and dataset[tag].value for tag in tags)
        else:
            item = Slice(next(scanned), dataset)
            yield dataset, tuple(element_value(item, tag) for tag in tags)
