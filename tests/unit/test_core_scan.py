"""The header scanner against pydicom, which is slower and knows everything."""

import contextlib
import logging
import struct
import warnings
import zlib
from pathlib import Path

import pydicom
import pydicom.data
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode import _core
from dicomnode.errors import InvalidDicom

PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}
FILES = sorted(
    str(file)
    for file in (Path(pydicom.data.__file__).parent / "test_files").rglob("*")
    if file.is_file()
)
# A value or the last item is longer than what is left: pydicom returns that, we refuse.
CUT = {"MR_truncated.dcm", "rtplan_truncated.dcm", "DICOMDIR-nooffset"}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in {"OB", "OW", "SQ", "UN", "UT"}:
        return head + struct.pack("<HI", 0, length) + value
    return head + struct.pack("<H", length & 0xFFFF) + value


def part10(dataset: bytes, syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + element(0x00020010, "UI", uid) + dataset


def readable(file: str) -> pydicom.FileDataset | None:
    try:
        dataset = pydicom.dcmread(file)
        for _ in dataset.iterall():
            pass
    except Exception:  # noqa: BLE001 - whatever it is, pydicom cannot read it
        return None
    return dataset


@pytest.mark.parametrize("kind", ["path", "bytes"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).name)
def test_scan_finds_the_elements_that_pydicom_finds(file, kind):
    source = file if kind == "path" else Path(file).read_bytes()
    dataset = pydicom.dcmread(file) if readable(file) is not None else None
    if dataset is None or Path(file).name in CUT:
        with contextlib.suppress(InvalidDicom):
            _core.scan(source)
        return
    header = _core.scan(source)
    expected = []
    for tag in dataset._dict:
        expected.append(int(tag))
        if int(tag) in PIXELS:
            break
    assert header.tags() == expected
    assert all(tag in header for tag in expected)
    if "TransferSyntaxUID" in dataset.file_meta:
        assert header.transfer_syntax == dataset.file_meta.TransferSyntaxUID
    for tag in expected:
        raw = dataset.get_item(tag)
        found = header.get(tag)
        if tag in PIXELS:
            assert found is None
            continue
        if not isinstance(raw, RawDataElement) or raw.VR == "SQ":
            continue
        assert found is not None
        vr, value = found
        assert value == (raw.value or b"")
        if vr:
            assert vr == raw.VR
        else:
            assert raw.is_implicit_VR


@pytest.mark.parametrize("name", sorted(CUT))
def test_truncated_object_is_refused(name):
    with pytest.raises(InvalidDicom, match="SOPInstanceUID 1"):
        _core.scan(next(file for file in FILES if Path(file).name == name))


def test_attributes_are_those_of_pydicom():
    files = [file for file in FILES if Path(file).name in {"CT_small.dcm", "MR_small.dcm"}]
    assert len(files) == 2
    for file, image in zip(files, _core.scan_images(files), strict=True):
        ds = pydicom.dcmread(file)
        assert image.sop_class_uid == ds.SOPClassUID
        assert image.sop_instance_uid == ds.SOPInstanceUID
        assert image.study_instance_uid == ds.StudyInstanceUID
        assert image.series_instance_uid == ds.SeriesInstanceUID
        assert image.frame_of_reference_uid == ds.FrameOfReferenceUID
        assert image.transfer_syntax == ds.file_meta.TransferSyntaxUID
        assert image.modality == ds.Modality
        assert image.image_type == "\\".join(ds.ImageType)
        assert image.photometric_interpretation == ds.PhotometricInterpretation
        assert (image.rows, image.columns) == (ds.Rows, ds.Columns)
        assert image.samples_per_pixel == ds.SamplesPerPixel
        assert image.bits_allocated == ds.BitsAllocated
        assert image.bits_stored == ds.BitsStored
        assert image.high_bit == ds.HighBit
        assert image.pixel_representation == ds.PixelRepresentation
        assert image.number_of_frames == 1
        assert image.slope == float(ds.get("RescaleSlope", 1))
        assert image.intercept == float(ds.get("RescaleIntercept", 0))
        assert image.position == tuple(ds.ImagePositionPatient)
        assert image.orientation == tuple(ds.ImageOrientationPatient)
        assert image.pixel_spacing == tuple(ds.PixelSpacing)
        assert image.slice_thickness == ds.SliceThickness
        assert image.spacing_between_slices == ds.get("SpacingBetweenSlices")
        assert image.instance_number == ds.InstanceNumber
        assert not image.has_modality_lut
        assert not image.has_functional_groups
        assert image.pixel_tag == 0x7FE00010
        assert image.is_native


def test_bare_dataset_is_scanned_in_the_given_syntax():
    dataset = element(0x00080018, "UI", b"1.2.3\0") + element(0x00100010, "PN", b"A^B ")
    header = _core.scan(dataset, "1.2.840.10008.1.2.1")
    assert header.tags() == [0x00080018, 0x00100010]
    assert header.get(0x00100010) == ("PN", b"A^B ")
    assert header.transfer_syntax == ExplicitVRLittleEndian
    assert not header.big_endian
    assert header.pixel_length is None
    big = struct.pack(">HH2sH", 0x0008, 0x0018, b"UI", 6) + b"1.2.3\0"
    header = _core.scan(big, transfer_syntax="1.2.840.10008.1.2.2")
    assert header.big_endian
    assert header.get(0x00080018) == ("UI", b"1.2.3\0")


def test_header_tells_absent_from_valueless():
    pixels = element(0x7FE00010, "OW", b"abcd")
    sequence = element(0x00081140, "SQ", b"\xfe\xff\xdd\xe0\0\0\0\0", 0xFFFFFFFF)
    header = _core.scan(part10(sequence + pixels))
    assert 0x00081140 in header
    assert 0x7FE00010 in header
    assert 0x00080018 not in header
    assert header.get(0x00081140) is header.get(0x7FE00010) is header.get(0x00080018) is None
    assert header.get(0x00020010) == ("UI", b"1.2.840.10008.1.2.1\0")
    assert header.pixel_length == 4
    assert header.tags() == [0x00081140, 0x7FE00010]


def test_header_outlives_its_source(tmp_path):
    data = part10(element(0x00100010, "PN", b"A^B ") + element(0x7FE00010, "OW", bytes(100_000)))
    file = tmp_path / "a.dcm"
    file.write_bytes(data)
    headers = [_core.scan(str(file)), _core.scan(bytes(bytearray(data)))]
    file.unlink()
    del data
    for header in headers:
        assert header.get(0x00100010) == ("PN", b"A^B ")


def test_deflated_dataset_is_inflated():
    dataset = element(0x00080018, "UI", b"1.2.3\0") + element(0x7FE00010, "OB", bytes(999))
    machine = zlib.compressobj(wbits=-15)
    raw = machine.compress(dataset) + machine.flush()
    for deflated in (raw, zlib.compress(dataset)):
        header = _core.scan(part10(deflated, "1.2.840.10008.1.2.1.99"))
        assert header.tags() == [0x00080018, 0x7FE00010]
        assert header.get(0x00080018) == ("UI", b"1.2.3\0")
        assert header.pixel_length == 999
        bare = _core.scan(deflated, "1.2.840.10008.1.2.1.99")
        assert bare.tags() == header.tags()


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"DICM",
        bytes(128) + b"DICM",
        bytes(1000),
        b"<html>not found</html>" * 20,
        part10(element(0x00100010, "OB", b"0123456789", 0xFFFFFFF0)),
        part10(element(0x00100010, "PN", b"x", 90)),
        part10(element(0x00000002, "UI", b"1\0")),
        part10(element(0x7FE00010, "OW", b"abcd", 6)),
        part10(element(0x7FE00010, "OB", b"abcdefgh", 0xFFFFFFFF)),
        part10(element(0x00081140, "SQ", b"\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3, 0xFFFFFFFF)),
    ],
)
def test_damage_is_refused(source, tmp_path):
    file = tmp_path / "damaged"
    file.write_bytes(source)
    for either in (source, str(file)):
        with pytest.raises(InvalidDicom):
            _core.scan(either)
        with pytest.raises(InvalidDicom, match=r"object 0 of the list"):
            _core.scan_images([either])


def test_nesting_beyond_64_levels_is_refused():
    for depth, good in ((64, True), (65, False), (20_000, False)):
        inner = b""
        if depth < 100:
            for _ in range(depth):
                item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inner)) + inner
                inner = element(0x0040A730, "SQ", item)
        else:
            inner = element(0x0040A730, "SQ", b"\xfe\xff\x00\xe0" + b"\xff" * 4, 0xFFFFFFFF) * depth
        if good:
            assert _core.scan(part10(inner)).tags() == [0x0040A730]
        else:
            with pytest.raises(InvalidDicom, match="64 deep"):
                _core.scan(part10(inner))


def test_error_names_attribute_and_instance_and_no_other_value():
    dataset = (
        element(0x00080018, "UI", b"1.2.3\0")
        + element(0x00100010, "PN", b"Secret^Name ")
        + element(0x00281053, "DS", b"one ")
    )
    with pytest.raises(InvalidDicom) as caught:
        _core.scan_images([part10(dataset)])
    assert "SOPInstanceUID 1.2.3: (0028,1053) RescaleSlope" in str(caught.value)
    assert "Secret" not in str(caught.value)


def test_scan_images_keeps_order_and_names_the_first_bad_source():
    sources = [
        part10(element(0x00080018, "UI", f"1.2.{i:03}".encode() + b"\0")) for i in range(200)
    ]
    assert [image.sop_instance_uid for image in _core.scan_images(sources)] == [
        f"1.2.{i:03}" for i in range(200)
    ]
    assert _core.scan_images([]) == []
    sources[150] = sources[40] = b"damaged"
    with pytest.raises(InvalidDicom, match="object 40 of the list"):
        _core.scan_images(sources)


def test_scan_images_returns_an_image_itself_until_its_file_changes(tmp_path):
    path = tmp_path / "a.dcm"
    data = Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes()
    path.write_bytes(data)
    first, of_bytes = _core.scan_images([str(path), data])
    again = _core.scan_images([first, str(path), of_bytes])
    assert again[0] is first
    assert again[1] is not first
    assert again[2] is of_bytes
    (other,) = _core.scan_images([first], [0x00080060])
    assert other is not first
    time = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == time:
        # A file system counts in steps of some milliseconds.
        path.write_bytes(data.replace(b"-1024", b"-2024"))
    (changed,) = _core.scan_images([first])
    assert (first.intercept, changed.intercept) == (-1024, -2024)
    path.write_bytes(data[:-10000])
    with pytest.raises(InvalidDicom, match=r"PixelData"):
        _core.scan_images([first])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.dcm"):
        _core.scan_images([first])


def test_missing_file_is_an_os_error_with_its_name(tmp_path):
    missing = str(tmp_path / "missing")
    for call in (_core.scan, _core.is_dicom, lambda path: _core.scan_images([path])):
        with pytest.raises(FileNotFoundError) as caught:
            call(missing)
        assert caught.value.filename == missing
        with pytest.raises(IsADirectoryError):
            call(str(tmp_path))


def test_sources_of_other_types_are_type_errors(tmp_path):
    for source in (tmp_path, 7, None, bytearray(b"DICM")):
        with pytest.raises(TypeError):
            _core.scan(source)
        with pytest.raises(TypeError):
            _core.scan_images([source])


def test_is_dicom_tells_objects_from_other_files(tmp_path):
    file = tmp_path / "file"
    bare = element(0x00080018, "UI", b"1.2.3\0")
    for content in (part10(bare), bare, struct.pack("<HHI", 8, 0x18, 6) + b"1.2.3\0"):
        file.write_bytes(content)
        assert _core.is_dicom(str(file))
    for content in (b"", b"x", b"PK\x03\x04" + bytes(400), b"some text\n" * 40, bytes(500)):
        file.write_bytes(content)
        assert not _core.is_dicom(str(file))


def test_file_names_need_not_be_unicode(tmp_path):
    file = Path(str(tmp_path / "\udcff.dcm"))
    file.write_bytes(part10(element(0x00080018, "UI", b"1.2.3\0")))
    assert _core.is_dicom(str(file))
    assert _core.scan(str(file)).tags() == [0x00080018]
    assert _core.scan_images([str(file)])[0].sop_instance_uid == "1.2.3"


@pytest.mark.parametrize("value", [b"MR", b" CT \0", b"\0 A\xe9B\xff \0 ", b"", b" \0"])
def test_short_text_is_without_padding(value: bytes) -> None:
    padded = value + b" " * (len(value) % 2)
    dataset = b"\x08\x00\x60\x00CS" + len(padded).to_bytes(2, "little") + padded
    header = _core.scan(dataset, "1.2.840.10008.1.2.1")
    assert header.text(0x00080060) == padded.decode("ascii", "replace").strip(" \0")
    assert header.text(0x00080018) == ""
