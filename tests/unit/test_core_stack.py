"""Stacking against a numpy version that follows the rule one step at a time."""

import os
import re
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from dicomnode import _core
from dicomnode.errors import InvalidDataset, InvalidDicom, UnsupportedImage

DTYPES = ["f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4"]
LITTLE, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
IMPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"


def reference(cells, allocated, stored, high, signed, big, slope, intercept):
    """Every stored value as the standard defines it, then slope and intercept in float64."""
    order = ">" if big else "<"
    raw = np.frombuffer(cells, f"{order}u{allocated // 8}").astype(np.int64)
    value = (raw >> (high + 1 - stored)) & ((1 << stored) - 1)
    if signed:
        value = np.where(value >> (stored - 1) == 1, value - (1 << stored), value)
    return value.astype(np.float64) * slope + intercept


def part10(
    cells, rows, columns, *, syntax=LITTLE, vr="OW", slope="1", intercept="0", allocated=16,
    stored=16, high=15, signed=0, uid="1.2.3", extra=(), length=None,
):  # fmt: skip
    e = ">" if syntax == BIG else "<"

    def element(tag, vr, value, length=None):
        length = len(value) if length is None else length
        head = struct.pack(e + "HH", tag >> 16, tag & 0xFFFF)
        if syntax == IMPLICIT and tag >> 16 != 2:
            return head + struct.pack("<I", length) + value
        if vr in ("OB", "OW"):
            return head + vr.encode() + struct.pack(e + "HI", 0, length) + value
        return head + vr.encode() + struct.pack(e + "H", length) + value

    def text(tag, vr, value):
        return element(tag, vr, value.encode() + b" " * (len(value) % 2))

    dataset = text(0x00080018, "UI", uid)
    numbers = {0x00280010: rows, 0x00280011: columns, 0x00280100: allocated, 0x00280101: stored}
    for tag, number in (numbers | {0x00280102: high, 0x00280103: signed} | dict(extra)).items():
        if isinstance(number, str):
            dataset += text(tag, "IS", number)
        else:
            dataset += element(tag, "US", struct.pack(e + "H", number))
    dataset += text(0x00281052, "DS", intercept) + text(0x00281053, "DS", slope)
    dataset += element(0x7FE00010, vr, cells, length)
    if syntax == DEFLATED:
        machine = zlib.compressobj(wbits=-15)
        dataset = machine.compress(dataset) + machine.flush()
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
    return bytes(128) + b"DICM" + meta + dataset


def one(cells, rows=1, columns=1, **changes):
    attributes = {"bits_allocated": 16, "bits_stored": 16, "high_bit": 15}
    attributes |= {"pixel_representation": 0, "sop_instance_uid": "1.2.3"} | changes
    return _core.Image(cells, rows=rows, columns=columns, **attributes)


def formats():
    for allocated in (8, 16, 32):
        for stored in (1, 7, 8, 12, 16, 24, 31, 32):
            for high in {stored - 1, stored + 2, allocated - 1}:
                if stored - 1 <= high < allocated:
                    yield allocated, stored, high


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("allocated", "stored", "high"), sorted(set(formats())))
def test_every_format_and_dtype_follows_the_rule(allocated, stored, high, dtype):
    rng = np.random.default_rng(1)
    rows, columns = 7, 333
    cells = rng.bytes(rows * columns * allocated // 8)
    for signed in (0, 1):
        for big in (False, True):
            for slope, intercept in ((1, 0), (1, -1024), (-2, 3), (0.1, -0.3), (0.5, 0), (1e-9, 7)):
                expected = reference(cells, allocated, stored, high, signed, big, slope, intercept)
                image = one(
                    cells, rows, columns, bits_allocated=allocated, bits_stored=stored,
                    high_bit=high, pixel_representation=signed, big_endian=big,
                    slope=slope, intercept=intercept,
                )  # fmt: skip
                out = np.empty((1, rows, columns), dtype)
                with np.errstate(all="ignore"):
                    cast = expected.astype(dtype)
                info = np.iinfo(dtype) if dtype[0] != "f" else None
                fits = info is None or (
                    (expected == np.trunc(expected)).all()
                    and expected.min() >= info.min
                    and expected.max() <= info.max
                )
                if fits:
                    _core.stack([image], out)
                    assert np.array_equal(out.ravel(), cast)
                else:
                    with pytest.raises(InvalidDataset, match=r"1\.2\.3.*float32") as caught:
                        _core.stack([image], out)
                    found = re.search(r"from (\S+) to (\S+) with", str(caught.value))
                    assert found is not None
                    assert float(found[1]) == expected.min()
                    assert float(found[2]) == expected.max()


@pytest.mark.parametrize("syntax", [LITTLE, BIG, IMPLICIT, DEFLATED])
@pytest.mark.parametrize("shape", [(1, 1), (1, 513), (513, 1), (31, 17), (700, 301)])
def test_objects_in_files_and_in_memory_give_the_same_array(syntax, shape, tmp_path):
    rng = np.random.default_rng(2)
    dtype = ">u2" if syntax == BIG else "<u2"
    stored = rng.integers(0, 4096, (5, *shape)).astype(dtype)
    objects = [
        part10(cells.tobytes(), *shape, syntax=syntax, stored=12, high=11, slope=f"{k + 1}.5",
               intercept="-1024")
        for k, cells in enumerate(stored)
    ]  # fmt: skip
    paths = []
    for k, data in enumerate(objects):
        (tmp_path / str(k)).write_bytes(data)
        paths.append(str(tmp_path / str(k)))
    slopes = (np.arange(5) + 1.5)[:, None, None]
    expected = (stored.astype("f8") * slopes - 1024).astype("f4")
    for sources in (objects, paths):
        out = np.full(stored.shape, np.nan, "f4")
        _core.stack(_core.scan_images(sources), out)
        assert np.array_equal(out, expected)
        plain = np.empty(stored.shape, "i2")
        _core.stack(_core.scan_images(sources), plain, rescale=False)
        assert np.array_equal(plain, stored)


@pytest.mark.parametrize("vr", ["OB", "OW"])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_big_endian_words_of_8_bit_cells_are_swapped_back(vr, count):
    cells = np.arange(1, count + 1, dtype="u1")
    padded = np.append(cells, [0] * (count % 2)).astype("u1")
    written = padded.reshape(-1, 2)[:, ::-1] if vr == "OW" else padded
    data = part10(written.tobytes(), 1, count, syntax=BIG, vr=vr, allocated=8, stored=8, high=7)
    out = np.empty((1, 1, count), "u1")
    _core.stack(_core.scan_images([data]), out)
    assert np.array_equal(out[0, 0], cells)


def test_slices_may_differ_in_format_and_rescale():
    images = [
        one(np.array([[5, -5]], "i1"), 1, 2, bits_allocated=8, bits_stored=8, high_bit=7,
            pixel_representation=1),
        one(np.array([[5, 60000]], "u2"), 1, 2, slope=2),
        one(np.array([[7, -7]], ">i4"), 1, 2, bits_allocated=32, bits_stored=32, high_bit=31,
            pixel_representation=1, big_endian=True, intercept=0.5),
    ]  # fmt: skip
    out = np.empty((3, 1, 2), "f4")
    _core.stack(images, out)
    assert out.tolist() == [[[5, -5]], [[10, 120000]], [[7.5, -6.5]]]


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm",
                                  "MR_small_implicit.dcm"])  # fmt: skip
def test_real_images_have_the_values_of_pydicom(name):
    import pydicom

    path = get_testdata_file(name)
    ds = pydicom.dcmread(path)
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    expected = (ds.pixel_array.astype("f8") * slope + intercept).astype("f4")
    out = np.empty((1, ds.Rows, ds.Columns), "f4")
    _core.stack(_core.scan_images([path]), out)
    assert np.array_equal(out[0], expected)


def test_surplus_pixel_data_is_ignored_and_missing_is_refused():
    cells = np.arange(6, dtype="<u2").tobytes()
    out = np.empty((1, 2, 3), "u2")
    _core.stack(_core.scan_images([part10(cells + b"more", 2, 3)]), out)
    assert out.ravel().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InvalidDicom, match=r"1\.2\.3: .*at least 12 bytes, found 10"):
        _core.stack(_core.scan_images([part10(cells[:-2], 2, 3)]), out)
    with pytest.raises(InvalidDicom, match=r"1\.2\.3: .*at least 12 bytes.*, found 10"):
        one(cells[:-2], 2, 3)


@pytest.mark.parametrize("length", [0, -4, 4])
@pytest.mark.parametrize("syntax", [LITTLE, "1.2.840.10008.1.2.5"])
def test_file_that_was_changed_since_the_scan_is_refused(tmp_path, length, syntax):
    file = tmp_path / "a.dcm"
    if syntax == LITTLE:
        data = part10(bytes(12), 2, 3)
    else:
        data = Path(get_testdata_file("MR_small_RLE.dcm")).read_bytes()
    file.write_bytes(data)
    images = _core.scan_images([str(file)])
    out = np.empty((1, images[0].rows, images[0].columns), "i2")
    _core.stack(images, out)
    file.write_bytes(data[:length] if length < 0 else data + bytes(length))
    os.utime(file, (1, 1))
    with pytest.raises(InvalidDicom, match="changed since; load it again"):
        _core.stack(images, out)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        _core.stack(images, out)


def test_file_that_gets_another_link_since_the_scan_is_the_same(tmp_path):
    file = tmp_path / "a.dcm"
    file.write_bytes(part10(bytes(12), 2, 3))
    images = _core.scan_images([str(file)])
    os.link(file, tmp_path / "b.dcm")
    _core.stack(images, np.empty((1, 2, 3), "u2"))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"slope": "0"}, InvalidDicom, "RescaleSlope"),
        ({"stored": 0}, InvalidDicom, "BitsStored"),
        ({"stored": 17, "high": 16}, InvalidDicom, "BitsStored"),
        ({"high": 16}, InvalidDicom, "HighBit"),
        ({"stored": 12, "high": 10}, InvalidDicom, "HighBit"),
        ({"signed": 2}, InvalidDicom, "PixelRepresentation"),
        ({"allocated": 12, "stored": 12, "high": 11}, UnsupportedImage, "BitsAllocated"),
        ({"allocated": 64, "stored": 64, "high": 63}, UnsupportedImage, "BitsAllocated"),
        ({"extra": {0x00280002: 3}}, InvalidDicom, "SamplesPerPixel"),
        ({"extra": {0x00280008: "2"}}, InvalidDicom, "at least 24 bytes, found 12"),
        ({"extra": {0x00280010: 3}}, InvalidDicom, "Rows"),
        ({"extra": {0x00280011: 65535}}, InvalidDicom, "Columns"),
        ({"syntax": "1.2.840.10008.1.2.4.70"}, InvalidDicom, "expected fragments"),
        ({"syntax": "1.2.840.10008.1.2.4.102"}, UnsupportedImage, r"H\.264"),
    ],
)
def test_unusable_image_is_refused_by_name(changes, error, match):
    images = _core.scan_images([part10(bytes(12), 2, 3, **changes)])
    with pytest.raises(error, match=rf"1\.2\.3: .*{match}"):
        _core.stack(images, np.empty((1, 2, 3), "f4"))


def test_slope_of_zero_matters_only_with_rescale():
    images = _core.scan_images([part10(bytes(12), 2, 3, slope="0")])
    out = np.ones((1, 2, 3), "f4")
    _core.stack(images, out, rescale=False)
    assert not out.any()


def test_values_beyond_a_float_are_refused():
    image = one(np.array([65535], "u2"), slope=1e36)
    with pytest.raises(InvalidDataset, match="float64"):
        _core.stack([image], np.empty((1, 1, 1), "f4"))
    out = np.empty((1, 1, 1))
    _core.stack([image], out)
    assert out[0, 0, 0] == 65535 * 1e36


@pytest.mark.parametrize("dtype", ["f2", "i8", "u8", "?", "c8", ">f4", ">i2", "S4", "f4,f4"])
def test_out_of_another_dtype_is_a_type_error(dtype):
    with pytest.raises(TypeError, match="float32"):
        _core.stack([one(bytes(2))], np.empty((1, 1, 1), dtype))


def test_out_of_another_shape_or_layout_is_a_value_error():
    image = one(bytes(12), 2, 3)
    readonly = np.empty((1, 2, 3), "f4")
    readonly.flags.writeable = False
    unaligned = np.zeros(4 * 6 + 1, "u1")[1:].view("f4").reshape(1, 2, 3)
    for out in (
        np.empty((2, 3), "f4"),
        np.empty((1, 1, 2, 3), "f4"),
        np.empty((2, 2, 3), "f4"),
        np.empty((1, 2, 3), "f4", order="F"),
        np.empty((1, 2, 6), "f4")[:, :, ::2],
        readonly,
        unaligned,
    ):
        with pytest.raises(ValueError, match="expected"):
            _core.stack([image], out)
    with pytest.raises(InvalidDicom, match="Rows"):
        _core.stack([image], np.empty((1, 3, 2), "f4"))
    with pytest.raises(TypeError):
        _core.stack([image], [[[0.0]]])
    with pytest.raises(TypeError):
        _core.stack([b"image"], np.empty((1, 2, 3), "f4"))


def test_out_may_not_be_the_pixels_themselves():
    array = np.zeros((1, 2, 3), "u2")
    with pytest.raises(ValueError, match="overlap"):
        _core.stack([one(array[0], 2, 3)], array)


def test_no_images_fill_an_empty_array():
    _core.stack([], np.empty((0, 2, 3), "f4"))


def test_pixels_outlive_the_names_they_were_given_by(tmp_path):
    expected = np.arange(500 * 300, dtype="<u2").reshape(500, 300)
    array = expected.copy()
    images = [
        one(array, 500, 300),
        one(bytearray(array.tobytes()), 500, 300),
        one(memoryview(array.tobytes()), 500, 300),
        *_core.scan_images([part10(array.tobytes(), 500, 300)]),
        *_core.scan_images([part10(array.tobytes(), 500, 300, syntax=DEFLATED)]),
    ]
    del array
    junk = [np.full(500 * 300, 7, "u2") for _ in range(20)]
    out = np.empty((5, 500, 300), "u2")
    _core.stack(images, out)
    assert (out == expected).all()
    assert len(junk) == 20


def test_pixels_that_are_not_contiguous_or_no_buffer_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        one(np.zeros((4, 6), "u2")[:, ::2], 2, 3)
    with pytest.raises(TypeError):
        one("text", 2, 3)


def test_p28_many_threads_stack_at_once():
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 65536, (24, 128, 128)).astype("<u2")
    images = _core.scan_images([part10(cells.tobytes(), 128, 128) for cells in stored])
    gate = threading.Barrier(6)

    def work(_):
        gate.wait()
        for _ in range(10):
            out = np.zeros(stored.shape, "f4")
            _core.stack(images, out)
            if not np.array_equal(out, stored):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_image_given_by_hand_reports_what_it_was_given():
    image = one(bytes(12), 2, 3, bits_stored=12, high_bit=11, slope=2.5, intercept=-1.0)
    assert (image.rows, image.columns, image.samples_per_pixel, image.number_of_frames) == (
        2,
        3,
        1,
        1,
    )
    assert (image.bits_allocated, image.bits_stored, image.high_bit) == (16, 12, 11)
    assert (image.slope, image.intercept, image.sop_instance_uid) == (2.5, -1.0, "1.2.3")
    assert image.is_native
    assert image.pixel_tag == 0x7FE00010
    assert image.position is image.orientation is image.pixel_spacing is None
    assert image.modality == image.transfer_syntax == ""
