"""Conversion between transfer syntaxes: no value and no pixel changes."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from dicomnode.errors import DicomnodeError, UnsupportedImage
from dicomnode.lib.dicom import dataset_of, encode, part10_prefix, scan
from dicomnode.lib.images import Reading, read_array, read_slices
from dicomnode.lib.transcode import EXPLICIT, IMPLICIT, transcode
from dicomnode.testing import make_series

FILES = sorted(
    Path(path)
    for path in pydicom.data.get_testdata_files("*.dcm")
    if "dicomdir" not in path.lower()
)
BOTH = pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])


def converted(data: bytes, syntax: str) -> bytes:
    dataset = bytes(transcode(data, syntax))
    header = scan(dataset, syntax)
    sop_class, uid = (header.get(tag) for tag in (0x00080016, 0x00080018))
    texts = [one[1].decode().strip("\0 ") if one else "1.2" for one in (sop_class, uid)]
    return part10_prefix(texts[0], texts[1], syntax) + dataset


def pixels_of(data: bytes) -> Any:
    slices, _ = read_slices([data])
    return read_array(slices, Reading(values="stored"))[0]


def values_of(dataset: Dataset) -> Iterator[tuple[int, str, Any]]:
    for element in dataset:
        if element.tag.group == 0x7FE0 or element.tag.element == 0 or element.tag.is_private:
            continue
        if element.VR == "SQ":
            for item in element.value:
                yield from values_of(item)
        elif element.VR not in ("OW", "OB", "UN"):
            yield int(element.tag), element.VR, element.value


@BOTH
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_pydicom_keeps_pixels_and_values(path: Path, syntax: str) -> None:
    data = path.read_bytes()
    try:
        before = pixels_of(data)
    except (DicomnodeError, OSError):
        before = None
    try:
        after = converted(data, syntax)
    except DicomnodeError:
        # What is damaged, or not decoded, is not converted.
        assert (
            before is None or dcmread(path, force=True).file_meta.TransferSyntaxUID.is_encapsulated
        )
        return
    if before is not None:
        assert numpy.array_equal(pixels_of(after), before)
    changed = {0x00280004, 0x00280006, 0x00280102, 0x00282110}
    wanted, found = (
        {
            tag: value
            for tag, vr, value in values_of(dcmread(io.BytesIO(one), force=True))
            if tag not in changed
        }
        for one in (data, after)
    )
    assert found == wanted


@BOTH
@pytest.mark.parametrize(
    "name",
    ["rle", "jpeg2000", "jpegls", "jpeg"],
)
def test_compressed_pixels_become_what_decoding_gives(name: str, syntax: str) -> None:
    source = {
        "rle": "MR_small_RLE.dcm",
        "jpeg2000": "MR_small_jp2klossless.dcm",
        "jpegls": "MR_small_jpeg_ls_lossless.dcm",
        "jpeg": "SC_rgb_jpeg_dcmtk.dcm",
    }[name]
    path = pydicom.data.get_testdata_file(source)
    data = Path(str(path)).read_bytes()
    after = converted(data, syntax)
    assert numpy.array_equal(pixels_of(after), pixels_of(data))
    dataset = dcmread(io.BytesIO(after))
    assert not dataset.file_meta.TransferSyntaxUID.is_encapsulated
    # pydicom reads it as we do.
    assert numpy.array_equal(dataset.pixel_array, pixels_of(data).squeeze())
    if name == "jpeg":
        assert dataset.PhotometricInterpretation == "RGB"
        assert dataset.PlanarConfiguration == 0
        assert dataset.LossyImageCompression == "01"


def test_big_endian_words_are_turned_round_in_sequences_too() -> None:
    (original,) = make_series(1, 4, 4)

    def made(order: str) -> Dataset:
        image = copy.deepcopy(original)
        image.PixelData = numpy.arange(16, dtype=f"{order}u2").tobytes()
        table = Dataset()
        table.LUTDescriptor = [3, 0, 16]
        table.add_new(0x00283006, "OW", numpy.arange(3, dtype=f"{order}u2").tobytes())
        image.ModalityLUTSequence = [table]
        image.FrameIncrementPointer = 0x00181063
        return image

    big, little = made(">"), made("<")
    big.file_meta = FileMetaDataset()
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    buffer = io.BytesIO()
    big.preamble = b"\0" * 128  # type: ignore[attr-defined]
    big.save_as(buffer, enforce_file_format=True)
    assert bytes(transcode(buffer.getvalue(), EXPLICIT)) == bytes(dataset_of(encode(little)[0]))


@BOTH
def test_values_in_an_unknown_character_set_keep_their_bytes(syntax: str) -> None:
    (image,) = make_series(1, 4, 4)
    image.PatientName = "PLACE^HOLDER"
    data = encode(image)[0].replace(b"PLACE^HOLDER", b"\xc3\xd8^\xff\xfe\x1b$)C   ")
    assert b"\xc3\xd8^\xff\xfe\x1b$)C   " in bytes(transcode(data, syntax))


def test_a_long_value_of_an_implicit_object_becomes_un() -> None:
    (image,) = make_series(1, 4, 4)
    image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    image.add_new(0x00281201, "OW", b"\1\0" * 40000)
    image.add_new(0x00183104, "IS", list(range(40000)))
    found = dcmread(io.BytesIO(converted(encode(image)[0], EXPLICIT)))
    assert found.RedPaletteColorLookupTableData == b"\1\0" * 40000
    assert found[0x00183104].VR in ("UN", "IS")


def test_a_codestream_that_contradicts_its_header_is_not_converted() -> None:
    (image,) = make_series(1, 8, 8)
    image.compress(RLELossless)
    image.file_meta.TransferSyntaxUID = JPEG2000Lossless
    with pytest.raises(DicomnodeError):
        transcode(encode(image)[0], EXPLICIT)


def test_nothing_is_converted_to_a_compressed_syntax() -> None:
    (image,) = make_series(1, 4, 4)
    with pytest.raises(UnsupportedImage):
        transcode(encode(image)[0], str(RLELossless))


def test_the_same_syntax_gives_the_same_bytes() -> None:
    (image,) = make_series(1, 5, 5)
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = encode(image)[0]
    assert bytes(transcode(data, EXPLICIT)) == bytes(dataset_of(data))
