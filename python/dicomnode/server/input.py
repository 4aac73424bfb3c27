"""An input: which images a pipeline needs, when there are enough, and how they become data.

A pipeline holds input *classes*. For each case and look at it an instance is made, so inputs share
nothing between patients or pipelines.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import TagType

from dicomnode.lib.dicom import LazyDataset, Source, tag_of
from dicomnode.lib.expected import Expected, missing_images
from dicomnode.lib.gaps import find_gap
from dicomnode.lib.grinders import identity_grinder, reading_of
from dicomnode.lib.images import Decoded, Reading
from dicomnode.lib.uids import Uids

# No attribute that counts images has a tag below this, and no input needs so many images.
_LEAST_TAG = 0x00080000


class Datasets(Mapping[str, Dataset]):
    """SOPInstanceUID -> lazy dataset, in the order of arrival; each is made when it is asked for."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        decoded: Decoded | None = None,
        uids: Uids | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._uids = uids
        self._decoded = decoded
        self._made: dict[str, Dataset] = {}

    def __getitem__(self, uid: str) -> Dataset:
        dataset = self._made.get(uid)
        if dataset is None:
            dataset = self._made[uid] = LazyDataset(
                self._sources[uid], decoded=self._decoded, uids=self._uids
            )
        return dataset

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class AbstractInput(ABC):
    """What a pipeline waits for under one name. Subclass it and override `validate`.

    `data` maps SOPInstanceUID to dataset; `images` is how many there are.
    """

    #: Attributes that an image has to have, whatever their value: int, keyword or pydicom Tag.
    required_tags: ClassVar[Iterable[TagType]] = [
        0x00080018,
        0x7FE00010,
    ]  # SOPInstanceUID, PixelData

    #: Attributes and the value that they have to have. A list or set: one of its values. A compiled
    #: regular expression: it is found in the value. A function: it returns true for the value.
    required_values: ClassVar[Mapping[Any, Any]] = {}

    #: Turns the datasets into what `process` gets: any function of an iterable of datasets.
    image_grinder: Callable[..., Any] = staticmethod(identity_grinder)

    #: Decode each image as soon as it is stored, so that `process` can start when the last has come.
    #: For numpy_grinder and volume_grinder, also inside many_meta_grinder.
    eager: ClassVar[bool] = False

    #: How many images there are to be: a number, or the attribute that tells it, such as
    #: "ImagesInAcquisition", or a function of an image that does. Where the images do not tell,
    #: `validate` alone decides.
    expected_images: ClassVar[Any] = None

    #: Wait until the images form regular stacks, no slice of which is missing in between.
    gapless: ClassVar[bool] = False

    def __init__(self, data: Mapping[str, Dataset] | None = None) -> None:
        self.data: Mapping[str, Dataset] = {} if data is None else data

    @property
    def images(self) -> int:
        """How many images this input holds."""
        return len(self.data)

    @abstractmethod
    def validate(self) -> bool:
        """Whether there is enough to process. Called after each association that brought images."""

    def get_data(self) -> Any:
        """What `process` gets under this input's name: the grinder's result."""
        return self._grinder()(self.data.values())

    def _grinder(self) -> Callable[[Iterable[Dataset]], Any]:
        """The grinder without `self`: the seed allows a bare function as well as a staticmethod."""
        found = inspect.getattr_static(self, "image_grinder")
        if inspect.isfunction(found) and _wants_self(found):
            return found.__get__(self)
        if isinstance(found, staticmethod):
            return found.__func__
        if isinstance(found, classmethod):
            return self.image_grinder
        return found  # type: ignore[no-any-return]


def waits_for(one: AbstractInput) -> tuple[str, bool]:
    """What an input waits for, empty where for nothing; and whether its images tell their number."""
    if not one.validate():
        return "does not validate", False
    is_counted = False
    expected = expected_of(type(one))
    if isinstance(expected, int) and expected < _LEAST_TAG:
        is_counted = True
        if one.images < expected:
            return f"is not complete: {one.images} of {expected} images are here", is_counted
    elif expected is not None:
        missing, is_counted = missing_images(one.data.values(), expected)
        if missing:
            return f"is not complete: {missing}", is_counted
    if one.gapless and (gap := find_gap(one.data.values())):
        return f"has a gap: {gap}", is_counted
    return "", is_counted


def expected_of(kind: type[AbstractInput]) -> Expected | None:
    """`expected_images` as a number, a tag or a function; None where it is not set.

    Raises ValueError for what is none of these.
    """
    found = inspect.getattr_static(kind, "expected_images")
    if isinstance(found, staticmethod):
        found = found.__func__
    if found is None or (callable(found) and not isinstance(found, type)):
        return found
    if isinstance(found, int) and not isinstance(found, bool) and 0 < found < _LEAST_TAG:
        return found
    try:
        if isinstance(found, bool | float):
            raise TypeError
        tag = tag_of(found)
        vr = dictionary_VR(tag)
        if tag < _LEAST_TAG:
            raise ValueError
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{found!r} is neither a number of images nor a DICOM tag nor a function"
        ) from error
    if vr not in ("IS", "US", "UL"):
        raise ValueError(f"{found!r} is no attribute that counts")
    return tag


def eager_reading(kind: type[AbstractInput]) -> Reading | None:
    """How the images of an input are decoded when they arrive; None where they are not."""
    found = inspect.getattr_static(kind, "image_grinder")
    if isinstance(found, staticmethod):
        found = found.__func__
    return reading_of(found) if kind.eager else None


def _wants_self(function: Callable[..., Any]) -> bool:
    required = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    return len(required) == 2
