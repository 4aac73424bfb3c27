"""Lazy datasets, load(), names, identifiers, and the bytes that are written."""

import copy
import gzip
import io
import os
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid
from tests.e2e import wire

from dicomnode import _core
from dicomnode.errors import InvalidDataset, InvalidDicom
from dicomnode.lib import dicom
from dicomnode.lib.dicom import (
    LazyDataset,
    Received,
    Receiver,
    encode,
    header_element,
    identifier_of,
    is_uid,
    load,
    part10_prefix,
    safe_name,
    scan,
    tag_name,
    tag_of,
    to_scan,
    untouched_source,
)
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.lib.images import read_slices
from dicomnode.server.association import file_stem
from dicomnode.testing import make_series, write_series


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return write_series(make_series(1, 128, 128), tmp_path)[0]


def lazy_of(stored: Path, kind: str) -> LazyDataset:
    return LazyDataset(str(stored) if kind == "path" else stored.read_bytes())


both = pytest.mark.parametrize("kind", ["path", "bytes"])


def is_read(dataset: Dataset) -> bool:
    return "_dict" in dataset.__dict__


def pixels_are_read(dataset: Dataset) -> bool:
    return dataset.get_item(0x7FE00010, keep_deferred=True).value is not None


# Lazy datasets


@both
def test_the_header_is_read_when_it_is_looked_at_and_pixels_when_asked_for(
    stored: Path, kind: str
) -> None:
    lazy = lazy_of(stored, kind)
    assert not is_read(lazy)
    assert lazy.PatientID == "PHANTOM-1"
    assert is_read(lazy)
    assert not pixels_are_read(lazy)
    assert len(lazy.PixelData) == 128 * 128 * 2
    assert pixels_are_read(lazy)


@both
def test_grinding_does_not_read_the_datasets(stored: Path, kind: str) -> None:
    lazy = lazy_of(stored, kind)
    volume_grinder([lazy])
    assert not is_read(lazy)
    assert lazy.source == (str(stored) if kind == "path" else stored.read_bytes())


def test_a_file_that_is_gone_is_told_when_it_is_looked_at(stored: Path) -> None:
    lazy = LazyDataset(str(stored))
    stored.unlink()
    with pytest.raises(FileNotFoundError):
        _ = lazy.PatientID


@pytest.mark.parametrize("cut_off", [b"\x08\0\x18\0OB\0\0", b"\x08\0\x40\x11SQ\0\0" + b"\xff" * 4])
def test_bytes_at_which_pydicom_fails_are_invalid_dicom(cut_off: bytes) -> None:
    """An element without its length, a sequence without an end. Found by the fuzzer."""
    data = part10_prefix("1.2", "1.2.3", "1.2.840.10008.1.2.1") + cut_off
    with pytest.raises(InvalidDicom, match=f"an object of {len(data)} bytes"):
        LazyDataset(data).get("Modality")


@both
@pytest.mark.parametrize(
    "look",
    [
        lambda one: one.PatientName,
        lambda one: one["PatientName"].value,
        lambda one: one[0x00100010].value,
        lambda one: one.get("PatientName"),
        lambda one: one.get(0x00100010).value,
        lambda one: "PatientName" in one,
        len,
        lambda one: [element.tag for element in one],
        lambda one: sorted(one.keys()),
        lambda one: one.dir("Patient"),
        lambda one: one.to_json_dict(),
        lambda one: one.file_meta.TransferSyntaxUID,
        lambda one: one.pixel_array.tolist(),
        lambda one: one.group_dataset(0x10),
        lambda one: one.original_encoding,
        lambda one: hasattr(one, "NoSuchThing"),
        lambda one: one.preamble,
        repr,
        str,
    ],
)
def test_a_lazy_dataset_looks_like_the_one_that_pydicom_reads(
    stored: Path, kind: str, look: Callable[[Dataset], object]
) -> None:
    assert look(lazy_of(stored, kind)) == look(pydicom.dcmread(stored))


@both
def test_equality_is_that_of_the_content(stored: Path, kind: str) -> None:
    lazy, plain = lazy_of(stored, kind), pydicom.dcmread(stored)
    assert lazy == plain
    assert plain == lazy
    assert lazy == lazy_of(stored, kind)
    plain.PatientID = "other"
    assert lazy != plain
    with pytest.raises(AttributeError):
        _ = lazy.NoSuchThing


@both
def test_changes_are_kept_and_seen_by_grinders(stored: Path, kind: str) -> None:
    lazy = lazy_of(stored, kind)
    lazy.PatientID = "changed"
    assert lazy.PatientID == "changed"
    assert untouched_source(lazy) is not None
    lazy.RescaleIntercept = 0
    lazy.ImagePositionPatient[2] = 777
    volume = volume_grinder([lazy])
    assert volume.affine[2, 3] == 777
    numpy.testing.assert_array_equal(volume.array[0], lazy.pixel_array)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda one: setattr(one, "Rows", 64),
        lambda one: one["RescaleSlope"].__setattr__("value", "2"),
        lambda one: one.PixelSpacing.__setitem__(0, 9),
        lambda one: delattr(one, "ImagePositionPatient"),
        lambda one: one.pop("RescaleSlope"),
        lambda one: setattr(one, "PixelData", bytes(128 * 128 * 2)),
        lambda one: one.add_new(0x00283000, "SQ", []),
        lambda one: setattr(one, "SOPInstanceUID", "1.2.3"),
        lambda one: one.clear(),
        lambda one: one.update({"HighBit": pydicom.DataElement("HighBit", "US", 12)}),
    ],
)
def test_each_change_of_an_image_attribute_is_noticed(
    stored: Path, kind: str, change: Callable[[Dataset], object]
) -> None:
    lazy = lazy_of(stored, kind)
    change(lazy)
    assert untouched_source(lazy) is None


@both
def test_reading_alone_is_no_change(stored: Path, kind: str) -> None:
    lazy = lazy_of(stored, kind)
    _ = str(lazy), lazy.pixel_array, lazy.PixelData
    assert untouched_source(lazy) == lazy.source


@both
def test_what_is_set_before_the_first_look_is_kept(stored: Path, kind: str) -> None:
    lazy = lazy_of(stored, kind)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    lazy.file_meta = meta
    lazy.preamble = b"x" * 128
    assert lazy.PatientID == "PHANTOM-1"
    assert lazy.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2"
    assert lazy.preamble == b"x" * 128


@both
@pytest.mark.parametrize("state", ["unread", "read", "changed", "pixels"])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_copies_and_pickles_are_the_same_dataset(
    stored: Path, kind: str, state: str, duplicate: Callable[[Dataset], Dataset]
) -> None:
    lazy = lazy_of(stored, kind)
    if state != "unread":
        _ = lazy.PatientID
    if state == "changed":
        lazy.RescaleIntercept = "5"
    if state == "pixels":
        _ = lazy.PixelData
    other = duplicate(lazy)
    assert isinstance(other, LazyDataset)
    assert is_read(other) == (state != "unread")
    assert (untouched_source(other) is None) == (state == "changed")
    numpy.testing.assert_array_equal(numpy_grinder([other]), numpy_grinder([lazy]))
    assert other == lazy
    other.SliceThickness = "9"
    if duplicate is not copy.copy or state == "unread":
        assert lazy.SliceThickness == 2.5


def test_an_unread_dataset_of_a_path_is_pickled_as_its_path(stored: Path) -> None:
    assert len(pickle.dumps(LazyDataset(str(stored)))) < 500 + len(str(stored))


@both
def test_save_as_writes_what_was_read(stored: Path, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "copy.dcm"
    lazy_of(stored, kind).save_as(target)
    assert pydicom.dcmread(target) == pydicom.dcmread(stored)


@pytest.mark.parametrize(
    "syntax",
    ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"],
)
@both
def test_long_values_are_right_in_every_encoding(tmp_path: Path, kind: str, syntax: str) -> None:
    made = make_series(1, 128, 128)[0]
    made.file_meta.TransferSyntaxUID = syntax
    pixels = numpy.frombuffer(made.PixelData, "<u2")
    if syntax == "1.2.840.10008.1.2.2":
        made.PixelData = pixels.astype(">u2").tobytes()
    path = write_series([made], tmp_path)[0]
    lazy = lazy_of(path, kind)
    assert lazy.PatientID == "PHANTOM-1"
    numpy.testing.assert_array_equal(lazy.pixel_array.ravel(), pixels)
    assert untouched_source(lazy) == lazy.source
    numpy.testing.assert_array_equal(numpy_grinder([lazy]).ravel(), pixels - 1024.0)


# load()


def test_load_walks_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "a/c"):
        write_series(make_series(2, 2, 2), tmp_path / name)
    found = load(tmp_path)
    names = [str(Path(one.source).relative_to(tmp_path)) for one in found]
    assert names == [
        "a/0001.dcm", "a/0002.dcm", "a/c/0001.dcm", "a/c/0002.dcm", "b/0001.dcm", "b/0002.dcm",
    ]  # fmt: skip
    assert not any(is_read(one) for one in found)


def test_g13_load_leaves_out_a_dicomdir_and_what_is_no_dicom(tmp_path: Path) -> None:
    write_series(make_series(1, 2, 2), tmp_path)
    directory = Path(get_testdata_file("DICOMDIR"))
    (tmp_path / "DICOMDIR").write_bytes(directory.read_bytes())
    (tmp_path / "readme.txt").write_text("no DICOM " * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert [Path(one.source).name for one in load(tmp_path)] == ["0001.dcm"]


def test_load_takes_str_path_and_iterables(tmp_path: Path) -> None:
    first, second = write_series(make_series(2, 2, 2), tmp_path)
    assert len(load(str(first))) == len(load(first)) == 1
    assert len(load(str(tmp_path))) == 2
    paths = [second, str(first)]
    assert [one.source for one in load(iter(paths))] == [str(second), str(first)]
    assert load([]) == []


def test_a_named_file_has_to_exist_and_to_be_dicom(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("no DICOM at all " * 20)
    with pytest.raises(InvalidDicom):
        load(text)
    with pytest.raises(FileNotFoundError, match=r"missing\.dcm"):
        load(tmp_path / "missing.dcm")


def test_load_names_the_file_that_is_no_dicom(tmp_path: Path) -> None:
    paths = write_series(make_series(2, 2, 2), tmp_path)
    (tmp_path / "a.txt").write_text("no DICOM at all " * 20)
    with pytest.raises(InvalidDicom, match=r"a\.txt: expected a DICOM object"):
        load([*paths, tmp_path / "a.txt"])


def slow_walk(folder: Path) -> Iterator[str]:
    """What `load` finds in a folder without damage: one file after the other, in Python."""
    for directory, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            path = Path(directory, name)
            if not path.is_file():
                continue
            try:
                header = scan(str(path))
            except InvalidDicom:
                continue
            if 0x00041220 not in header:
                yield str(path)


def test_load_finds_what_a_slow_walk_finds(tmp_path: Path) -> None:
    files = write_series(make_series(8, 2, 2), tmp_path / "b")
    for number, name in enumerate(["a/z.dcm", "a/B/1", "a.b/1", "a-b/1", ".hidden/1", "é/1", "0"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[number].read_bytes())
    for name in ("a/notes", "a/empty.txt", ".hidden/lock", "b/.lock.dcm"):
        (tmp_path / name).write_text("" if "otes" not in name else "taken on a Monday")
    directory = Path(get_testdata_file("DICOMDIR"))
    (tmp_path / "b" / "DICOMDIR").write_bytes(directory.read_bytes())
    (tmp_path / "link.dcm").symlink_to(files[-1])
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "link to pipe").symlink_to(tmp_path / "pipe.dcm")
    wanted = list(slow_walk(tmp_path))
    assert len(wanted) == 16
    assert [one.source for one in load(tmp_path)] == wanted
    assert [one.source for one in load(f"{tmp_path}//./")] == wanted


def test_load_of_the_current_folder_gives_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(make_series(1, 2, 2), tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert [one.source for one in load(".")] == list(slow_walk(Path())) == ["a/0001.dcm"]


def test_a_pipe_that_is_named_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidDicom, match="pipe is not a regular file"):
        load(tmp_path / "pipe")


@pytest.mark.parametrize("suffix", ["", ".", ".dcm", ".DICOM", ".ima"])
def test_an_empty_file_that_is_called_like_an_image_is_damaged(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"image{suffix}").touch()
    with pytest.raises(InvalidDicom, match=r"image.* is damaged: .* take it out of the folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: data[:100],
        lambda data: data[:1],
        gzip.compress,
        lambda data: data[:128] + b"MCID" + data[132:],
    ],
)
def test_what_is_called_an_image_and_is_none_is_damaged(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    paths = write_series(make_series(3, 8, 8), tmp_path)
    paths[2].write_bytes(damage(paths[2].read_bytes()))
    with pytest.raises(InvalidDicom, match=r"0003\.dcm is damaged"):
        load(tmp_path)
    if set(paths[2].read_bytes()[:132]) <= {0} or set(paths[2].read_bytes()[:132]) <= {255}:
        paths[2].rename(tmp_path / "3")
        with pytest.raises(InvalidDicom, match="3 is damaged"):
            load(tmp_path)


def test_load_reads_an_image_whose_attributes_are_wrong_and_grinding_tells(tmp_path: Path) -> None:
    (path,) = write_series(make_series(1, 2, 2), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"-1024", b"-10x4"))
    (lazy,) = load(tmp_path)
    with pytest.raises(InvalidDicom, match="RescaleIntercept"):
        numpy_grinder([lazy])


def image_of(path: Path) -> _core.Image:
    (image,) = _core.scan_images([str(path)])
    return image


def test_load_keeps_the_scan_of_a_file_that_has_rested() -> None:
    """Files of a package are older than the two seconds that a file system may count in."""
    path = get_testdata_file("CT_small.dcm")
    (lazy,) = load(path)
    image = to_scan(lazy)
    assert isinstance(image, _core.Image)
    slices, _ = read_slices([lazy])
    assert slices[0].header is image
    assert slices[0].header.slope == image_of(Path(path)).slope


def test_load_keeps_no_scan_of_a_file_that_was_just_written(stored: Path) -> None:
    """Its time would not tell a change that follows at once."""
    (lazy,) = load(stored)
    assert to_scan(lazy) == str(stored)


@pytest.mark.parametrize("way", ["in place", "another file", "with its old times"])
def test_a_file_that_is_replaced_after_loading_is_ground_as_it_is_now(
    way: str, stored: Path
) -> None:
    lazy = LazyDataset(str(stored), image_of(stored))
    before = numpy_grinder([lazy])
    times = stored.stat()
    changed = stored.read_bytes().replace(b"-1024", b"-2024")
    if way == "another file":
        stored.unlink()
    stored.write_bytes(changed)
    while stored.stat().st_ctime_ns == times.st_ctime_ns:
        # A file system counts in steps of some milliseconds.
        stored.write_bytes(changed)
    if way == "with its old times":
        os.utime(stored, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stored.stat().st_size == times.st_size
    numpy.testing.assert_array_equal(numpy_grinder([lazy]), before - 1000)
    stored.unlink()
    with pytest.raises(FileNotFoundError, match=stored.name):
        numpy_grinder([lazy])


def test_a_change_of_a_loaded_dataset_counts_more_than_its_scan(stored: Path) -> None:
    lazy = LazyDataset(str(stored), image_of(stored))
    before = numpy_grinder([lazy])
    lazy.RescaleIntercept = "-2024"
    numpy.testing.assert_array_equal(numpy_grinder([lazy]), before - 1000)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_a_copy_of_a_loaded_dataset_is_equal_and_scanned_again(
    stored: Path, duplicate: Callable[[Dataset], Dataset]
) -> None:
    lazy = LazyDataset(str(stored), image_of(stored))
    other = duplicate(lazy)
    assert not is_read(other)
    assert to_scan(other) == str(stored)
    numpy.testing.assert_array_equal(numpy_grinder([other]), numpy_grinder([lazy]))
    assert other == lazy == LazyDataset(str(stored))


# Names


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_safe_names_are_safe_and_distinct(texts: list[str]) -> None:
    names = [safe_name(text) for text in texts]
    for name in names:
        assert name not in {"", ".", ".."}
        assert not set(name) & set('/\\\0:*?"<>|\n')
        assert name.isascii()
        assert len(name.encode()) <= 255 - len("Image__-2147483648.dcm.tmp")
        assert not name.startswith(".")
    assert names[0] != names[1]


@given(st.text(alphabet="aA.-%_/\\\0 é", max_size=150), st.text(alphabet="aA.%", max_size=150))
def test_texts_made_to_collide_have_distinct_names(first: str, second: str) -> None:
    assert (safe_name(first) == safe_name(second)) == (first == second)
    assert safe_name(safe_name(first)) != safe_name(first) or first == safe_name(first)


def test_safe_names_of_ordinary_identifiers_are_themselves() -> None:
    for text in ("PHANTOM-1", "1.2.840.10008", "010203-1234", "a_b"):
        assert safe_name(text) == text
    assert safe_name("../../etc/passwd") == "%2E.%2Fetc%2Fpasswd".replace("%2Fetc", "%2F..%2Fetc")
    assert safe_name("Ø") == "%C3%98"


@pytest.mark.parametrize("text", ["1", "1.2.840.10008.1.1", "2.25." + "9" * 59, "1.02.3"])
def test_a_uid_is_digits_and_dots(text: str) -> None:
    assert is_uid(text)


@pytest.mark.parametrize(
    "text", ["", ".", "1.", ".1", "1..2", "1.a", "1.2\n", " 1.2", "1" * 65, "../1", "1.٣"]
)
def test_what_is_no_uid(text: str) -> None:
    assert not is_uid(text)


def _raw(tag: int, vr: str, value: bytes) -> bytes:
    padded = value + (b" " if len(value) % 2 else b"")
    numbers = (tag >> 16, tag & 0xFFFF)
    head = b"".join(number.to_bytes(2, "little") for number in numbers)
    return head + vr.encode() + len(padded).to_bytes(2, "little") + padded


_VALUES = st.binary(max_size=20) | st.sampled_from(
    [
        b"CT",
        b"MR",
        b"7",
        b"+7",
        b"-07",
        b"0",
        b"PHANTOM-1",
        b" A ",
        b"A\\B",
        b"a~",
        b"1.5",
        b"a_b",
        b"Image.1",
    ]
)


def _names(uid: str, data: bytes, sop_class: str) -> tuple[str, str] | None:
    """What is known of an image that arrived."""
    receiver = Receiver([(3, wire.EXPLICIT)], 1 << 20, 1 << 20, 1 << 20)
    received = receiver.offer(wire.store(uid, data, sop_class))
    assert isinstance(received, Received)
    known = received.known()
    assert known is not None and received.known() is None
    return known[1]


@given(_VALUES, _VALUES, _VALUES, st.sampled_from(["LO", "SH", "UI", "LT"]), st.booleans())
def test_an_ordinary_image_has_the_names_that_a_closer_look_gives(
    modality: bytes, identifier: bytes, number: bytes, vr: str, is_latin: bool
) -> None:
    data = (
        (_raw(0x00080005, "CS", b"ISO_IR 100") if is_latin else b"")
        + _raw(0x00080016, "UI", b"1.2.3\0")
        + _raw(0x00080018, "UI", b"1.2.4\0")
        + _raw(0x00080060, "CS", modality)
        + _raw(0x00100020, vr, identifier)
        + _raw(0x00200013, "IS", number)
    )
    header = scan(data, "1.2.840.10008.1.2.1")
    found = _names("1.2.4", data, "1.2.3")
    assert _names("1.2.5", data, "1.2.3") is None
    assert _names("1.2.4", data, "1.2") is None
    if found is not None:
        assert found == (identifier_of(header, 0x00100020), file_stem(header, "1.2.4"))
    elif re.fullmatch(rb"[A-Z]{1,16}", modality) and re.fullmatch(rb"[0-9]{1,12}", number):
        plain = re.fullmatch(rb" *[!-Z]+ *", identifier)
        assert not (plain and vr in ("LO", "SH"))


def test_a_text_that_utf8_cannot_hold_is_no_uid() -> None:
    assert not is_uid("1.2.\udc80")


def test_tags_are_given_in_any_form() -> None:
    assert {tag_of(0x00100020), tag_of("PatientID"), tag_of((0x10, 0x20))} == {0x00100020}
    assert tag_name(0x00100020) == "(0010,0020) PatientID"
    assert tag_name(0x00110020) == "(0011,0020)"
    with pytest.raises(ValueError, match="NoSuchTag"):
        tag_of("NoSuchTag")


# Identifiers


def scanned(dataset: Dataset, syntax: str = "1.2.840.10008.1.2.1") -> dicom.Header:
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    return scan(encode(dataset)[0])


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"]
)
@pytest.mark.parametrize(
    ("charset", "keyword", "value", "expected"),
    [
        (None, "PatientID", "abc", "abc"),
        (None, "PatientID", "  abc  ", "abc"),
        (None, "PatientID", "", ""),
        (None, "PatientID", None, ""),
        (None, "OtherPatientIDs", ["a", "b"], "a\\b"),
        (None, "InstanceNumber", "7", "7"),
        (None, "PatientWeight", "70.50", "70.50"),
        (None, "StudyInstanceUID", "1.2.30", "1.2.30"),
        (None, "Rows", 12, "12"),
        ("ISO_IR 100", "PatientID", "Ærø", "Ærø"),
        ("ISO_IR 192", "PatientID", "患者", "患者"),
        (["", "ISO 2022 IR 87"], "PatientName", "Yamada=山田", "Yamada=山田"),
    ],
)
def test_the_identifier_is_the_value_as_text(
    syntax: str, charset: object, keyword: str, value: object, expected: str
) -> None:
    dataset = Dataset()
    if charset is not None:
        dataset.SpecificCharacterSet = charset
    setattr(dataset, keyword, value)
    assert identifier_of(scanned(dataset, syntax), tag_of(keyword)) == expected


def test_an_absent_identifier_is_empty() -> None:
    assert identifier_of(scanned(Dataset()), 0x00100020) == ""


def test_an_identifier_that_cannot_be_understood_is_an_error_without_its_value() -> None:
    dataset = Dataset()
    dataset.add_new(0x00189087, "LO", "secret")
    raw = encode_raw(dataset).replace(b"\x18\x00\x87\x90LO", b"\x18\x00\x87\x90FD")
    with pytest.raises(InvalidDicom, match="DiffusionBValue") as told:
        identifier_of(scan(raw), 0x00189087)
    assert "secret" not in str(told.value)


def encode_raw(dataset: Dataset) -> bytes:
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    return encode(dataset)[0]


@pytest.mark.parametrize("charset", ["NONSENSE", "ISO_IR 999"])
def test_an_unknown_character_set_keeps_the_identifier_readable(charset: str) -> None:
    raw = encode_raw(make_series(1, 2, 2)[0])
    raw = raw.replace(b"ISO_IR 192", charset.ljust(10).encode())
    assert identifier_of(scan(raw), 0x00100020) == "PHANTOM-1"


@given(
    st.binary(min_size=1, max_size=64).map(lambda raw: bytes(32 + one % 95 for one in raw)),
    st.sampled_from(
        ["", "ISO_IR 6", "ISO_IR 13", "ISO_IR 100", "ISO_IR 192", "GB18030", "\\ISO 2022 IR 87"]
    ),
)
def test_an_identifier_of_plain_text_is_what_pydicom_reads(value: bytes, charset: str) -> None:
    value += b" " * (len(value) % 2)
    raw = encode_raw(make_series(1, 2, 2, patient_id="I" * len(value))[0])
    old, new = b"\x0a\x00ISO_IR 192", charset.encode() + b" " * (len(charset) % 2)
    raw = raw.replace(old, len(new).to_bytes(2, "little") + new)
    header = scan(raw.replace(b"I" * len(value), value))
    found = identifier_of(header, 0x00100020)
    with mock.patch.object(dicom, "_PLAIN_TEXT", re.compile(b"(?!)")):
        assert found == identifier_of(header, 0x00100020)


# Writing


@pytest.mark.parametrize("source_ae_title", ["", "SENDER", "A", "x" * 20])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_the_prefix_is_read_back_by_pydicom(syntax: str, source_ae_title: str) -> None:
    prefix = part10_prefix("1.2.840.10008.5.1.4.1.1.2", "1.2.3.4", syntax, source_ae_title)
    meta = pydicom.dcmread(io.BytesIO(prefix)).file_meta
    assert meta.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert meta.MediaStorageSOPInstanceUID == "1.2.3.4"
    assert meta.TransferSyntaxUID == syntax
    assert meta.FileMetaInformationVersion == b"\x00\x01"
    assert meta.get("SourceApplicationEntityTitle", "") == source_ae_title[:16]
    assert meta.FileMetaInformationGroupLength == len(prefix) - 144


def test_the_prefix_is_read_back_by_dcmdump(peer: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(encode(make_series(1, 4, 4)[0])[0])
    told = subprocess.run([peer("dcmdump"), "+E", path], capture_output=True, text=True, check=True)
    assert "LittleEndianExplicit" in told.stdout
    assert "PHANTOM-1" in told.stdout
    assert "W:" not in told.stderr + told.stdout
    assert "E:" not in told.stderr + told.stdout


@pytest.mark.parametrize(
    "syntax",
    ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"],
)
def test_an_encoded_dataset_is_read_back_the_same(syntax: str) -> None:
    dataset = make_series(1, 5, 5)[0]
    dataset.file_meta.TransferSyntaxUID = syntax
    item = Dataset()
    item.PatientName = "Ωmega"
    dataset.OtherPatientIDsSequence = [item]
    raw, told = encode(dataset)
    assert told == syntax
    assert pydicom.dcmread(io.BytesIO(raw)) == dataset
    reference = io.BytesIO()
    dataset.save_as(reference, enforce_file_format=True)
    reference.seek(0)
    assert pydicom.dcmread(reference) == dataset


def test_a_dataset_without_file_meta_is_written_as_explicit_little_endian() -> None:
    dataset = make_series(1, 5, 5)[0]
    del dataset.file_meta
    raw, syntax = encode(dataset)
    assert syntax == "1.2.840.10008.1.2.1"
    assert pydicom.dcmread(io.BytesIO(raw)) == dataset
    assert not hasattr(dataset, "file_meta")


def test_a_compressed_dataset_is_written_encapsulated() -> None:
    dataset = make_series(1, 16, 16)[0]
    pixels = dataset.pixel_array
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    raw, syntax = encode(dataset)
    assert syntax == pydicom.uid.RLELossless
    numpy.testing.assert_array_equal(pydicom.dcmread(io.BytesIO(raw)).pixel_array, pixels)


def lacks_class(dataset: Dataset) -> None:
    del dataset.SOPClassUID


def bad_instance(dataset: Dataset) -> None:
    dataset["SOPInstanceUID"]._value = "../../x"


def private_syntax(dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = "1.2.3.4"


def no_syntax(dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.1"


def not_encapsulated(dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless


def number_too_large(dataset: Dataset) -> None:
    dataset.Rows = 70000


def text_for_number(dataset: Dataset) -> None:
    dataset["Rows"]._value = "many"


def unknown_vr(dataset: Dataset) -> None:
    dataset["Rows"].VR = "ZZ"


def group_2(dataset: Dataset) -> None:
    dataset.add_new(0x00020010, "UI", "1.2.840.10008.1.2")


def array_as_pixels(dataset: Dataset) -> None:
    dataset["PixelData"]._value = numpy.zeros((4, 4))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lacks_class, "SOPClassUID"),
        (bad_instance, "SOPInstanceUID"),
        (private_syntax, "1.2.3.4"),
        (no_syntax, "1.2.840.10008.1.1"),
        (not_encapsulated, "encapsulated"),
        (number_too_large, "0028,0010"),
        (text_for_number, "0028,0010"),
        (unknown_vr, "0028,0010"),
        (group_2, "0002,0010"),
        (array_as_pixels, "7FE0,0010"),
    ],
)
def test_a_dataset_that_cannot_be_written_is_an_error_that_names_it(
    damage: Callable[[Dataset], None], told: str
) -> None:
    dataset = make_series(1, 4, 4)[0]
    uid = dataset.SOPInstanceUID
    damage(dataset)
    with pytest.raises(InvalidDataset, match=told) as error:
        encode(dataset)
    assert uid in str(error.value) or damage is bad_instance


def test_pixels_of_the_other_byte_order_are_refused() -> None:
    path = get_testdata_file("MR_small_bigendian.dcm")
    dataset = pydicom.dcmread(path)
    assert encode(dataset)[1] == "1.2.840.10008.1.2.2"
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    with pytest.raises(InvalidDataset, match="byte order"):
        encode(dataset)


@pytest.mark.parametrize("damage", ["cut in the pixels", "cut in the header", "empty", "gone"])
def test_a_damaged_image_in_a_folder_is_an_error_and_not_left_out(
    damage: str, tmp_path: Path
) -> None:
    path = write_series(make_series(4), tmp_path)[-1]
    data = path.read_bytes()
    length = {"cut in the pixels": len(data) - 100, "cut in the header": 300}.get(damage, 0)
    path.write_bytes(data[:length])
    if damage == "gone":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises((InvalidDicom, OSError), match=path.name):
        load(tmp_path)


def test_what_is_no_dicom_in_a_folder_is_left_out(tmp_path: Path) -> None:
    write_series(make_series(4), tmp_path)
    (tmp_path / "README.txt").write_text("Four slices of a phantom.")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".dicomnode").mkdir()
    (tmp_path / ".dicomnode" / "lock").touch()
    (tmp_path / "notes").write_text("taken on a Monday")
    os.mkfifo(tmp_path / "pipe")
    assert len(load(tmp_path)) == 4


@pytest.mark.parametrize("signed", [0, 1])
def test_us_or_ss_follows_the_pixel_representation_in_implicit_vr(signed: int) -> None:
    (one,) = make_series(1)
    one.PixelRepresentation = signed
    one.add_new(0x00280120, "SS" if signed else "US", -2000 if signed else 63536)
    one.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    element = header_element(scan(encode(one)[0]), 0x00280120)
    assert element is not None and element.value == (-2000 if signed else 63536)
