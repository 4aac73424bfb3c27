"""Inputs: what they hold, and how their grinder is found."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.dicom import encode, scan
from dicomnode.lib.grinders import list_grinder, numpy_grinder
from dicomnode.server.input import AbstractInput, Datasets
from dicomnode.server.routing import compile_rules, route
from dicomnode.testing import make_series


class Base(AbstractInput):
    def validate(self) -> bool:
        return self.images > 0


def held(kind: type[AbstractInput], count: int = 3) -> AbstractInput:
    sources = {one.SOPInstanceUID: encode(one)[0] for one in make_series(count)}
    return kind(Datasets(sources))


def count_images(images: Iterable[Dataset]) -> int:
    return len(list(images))


def test_data_and_images() -> None:
    one = held(Base)
    assert one.images == len(one.data) == 3
    assert all(dataset.SOPInstanceUID == uid for uid, dataset in one.data.items())
    assert Base().images == 0 and dict(Base().data) == {}


def test_the_same_dataset_is_given_each_time() -> None:
    one = held(Base)
    uid = next(iter(one.data))
    assert one.data[uid] is one.data[uid]
    with pytest.raises(KeyError):
        one.data["1.2.3"]


def test_the_default_grinder_gives_the_datasets() -> None:
    assert count_images(held(Base).get_data()) == 3


@pytest.mark.parametrize(
    "grinder",
    [count_images, staticmethod(count_images), lambda images: len(list(images))],
)
def test_a_grinder_may_be_a_bare_function_or_a_staticmethod(grinder: Any) -> None:
    kind = type("Kind", (Base,), {"image_grinder": grinder})
    assert held(kind).get_data() == 3


def test_a_grinder_may_be_any_callable() -> None:
    class Counter:
        def __call__(self, images: Iterable[Dataset]) -> int:
            return count_images(images)

    assert held(type("Kind", (Base,), {"image_grinder": Counter()})).get_data() == 3
    assert held(type("Kind", (Base,), {"image_grinder": list})).get_data()[0].Modality == "CT"
    assert held(type("Kind", (Base,), {"image_grinder": numpy_grinder})).get_data().shape[0] == 3
    assert held(type("Kind", (Base,), {"image_grinder": list_grinder})).get_data()


def test_a_grinder_may_be_a_method() -> None:
    class Kind(Base):
        def image_grinder(self, images: Iterable[Dataset]) -> tuple[int, int]:
            return self.images, count_images(images)

    assert held(Kind).get_data() == (3, 3)


def test_a_grinder_may_be_a_class_method() -> None:
    class Kind(Base):
        @classmethod
        def image_grinder(cls, images: Iterable[Dataset]) -> tuple[str, int]:
            return cls.__name__, count_images(images)

    assert held(Kind).get_data() == ("Kind", 3)


def refusal(attributes: dict[str, Any], **changes: Any) -> str:
    image = make_series(1)[0]
    for keyword, value in changes.items():
        setattr(image, keyword, value)
    kind = type("Kind", (Base,), attributes)
    return route(scan(encode(image)[0]), compile_rules({"x": kind}), 0x00100020).refused.get(
        "x", ""
    )


@pytest.mark.parametrize("tag", [0x00080060, "Modality", Tag(8, 0x60), (8, 0x60)])
def test_required_tags_are_int_keyword_or_tag(tag: Any) -> None:
    assert refusal({"required_tags": [tag]}) == ""


@pytest.mark.parametrize("name", ["\udc80", 7, None])
def test_a_name_that_no_ledger_could_hold_is_refused(name: Any) -> None:
    with pytest.raises(IncorrectlyConfigured, match="the name of an input has to be text"):
        compile_rules({name: Base})


def test_a_missing_tag_is_named() -> None:
    assert refusal({"required_tags": ["PatientWeight"]}) == "(0010,1030) PatientWeight is missing"
    assert "PatientWeight" in refusal({"required_values": {"PatientWeight": 70}})


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ("CT", True),
        ("MR", False),
        (["MR", "CT"], True),
        ({"MR", "PT"}, False),
        (("CT",), True),
        (re.compile("^C"), True),
        (re.compile("^M"), False),
        (lambda value: value == "CT", True),
        (lambda value: False, False),
    ],
)
def test_required_values(wanted: Any, taken: bool) -> None:
    assert (refusal({"required_values": {0x00080060: wanted}}) == "") is taken


def test_required_values_compare_as_pydicom_gives_them() -> None:
    assert refusal({"required_values": {"InstanceNumber": 1}}) == ""
    assert refusal({"required_values": {"Rows": 32}}) == ""
    assert refusal({"required_values": {"RescaleSlope": 1.0}}) == ""
    assert refusal({"required_values": {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}}) == ""
    assert refusal({"required_values": {"ImageType": re.compile("AXIAL")}}) == ""
    assert refusal({"required_values": {"PatientName": "Ærø^Åse"}}, PatientName="Ærø^Åse") == ""


def test_a_refusal_shows_no_patient() -> None:
    reason = refusal({"required_values": {"PatientName": "Other"}}, PatientName="Secret^Person")
    assert "Secret" not in reason and "PatientName" in reason


def test_refusals_of_inputs_do_not_depend_on_each_other() -> None:
    ct = type("Ct", (Base,), {"required_values": {"Modality": "CT"}})
    mr = type("Mr", (Base,), {"required_values": {"Modality": "MR"}})
    header = scan(encode(make_series(1)[0])[0])
    target = route(header, compile_rules({"ct": ct, "mr": mr, "any": Base}), 0x00100020)
    assert target.accepted == ("ct", "any")
    assert set(target.refused) == {"mr"}
    assert target.identifier == "PHANTOM-1"
