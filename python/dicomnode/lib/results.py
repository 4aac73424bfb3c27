"""A result, before it is sent: whether an archive could refuse it, or read other pixels than were meant.

Solves that what is wrong with a dataset of `process` is told at once, with its UID and the attribute,
and not by the archive, or by nobody. Looked at are what every object has to have, whatever its kind
(PS3.3 C.12.1, C.7.2.1 and C.7.3.1), and where there are pixels what describes them (PS3.3 C.7.6.3). What
is legal passes: objects without pixels, and attributes of type 2, which may be empty.
"""

import math
import re

from pydicom.uid import UID

from dicomnode.errors import InvalidDataset
from dicomnode.lib.dicom import Header, header_number, is_uid, tag_name, tag_of

_UIDS = {
    0x00080016: "set it to what kind of object this is, such as that of its source image",
    0x00080018: "give each result a new one (pydicom.uid.generate_uid)",
    0x0020000D: "copy it from a source image, so that the result is filed in that study",
    0x0020000E: "give all results of one series the same new one (pydicom.uid.generate_uid)",
}
_MODALITY = 0x00080060
# Of these Modality is of type 3 (PS3.3 C.8.6.1).
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7."
# These are about no patient, and have no study (PS3.4 annex GG).
_OF_NO_PATIENT = {
    "1.2.840.10008.5.1.4.1.1.200.1",  # CT Defined Procedure Protocol
    "1.2.840.10008.5.1.4.1.1.200.3",  # Protocol Approval
    "1.2.840.10008.5.1.4.1.1.200.7",  # XA Defined Procedure Protocol
    "1.2.840.10008.5.1.4.1.1.201.1",  # Inventory
    "1.2.840.10008.5.1.4.38.1",  # Hanging Protocol
    "1.2.840.10008.5.1.4.39.1",  # Color Palette
    "1.2.840.10008.5.1.4.43.1",  # Generic Implant Template
    "1.2.840.10008.5.1.4.44.1",  # Implant Assembly Template
    "1.2.840.10008.5.1.4.45.1",  # Implant Template Group
}
_PIXEL_DATA, _PROVIDER_URL = 0x7FE00010, 0x00287FE0
# What holds pixels, and how many bits each takes; None where BitsAllocated tells it.
_PIXELS = {_PIXEL_DATA: None, 0x7FE00008: 32, 0x7FE00009: 64}
_SAMPLES = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}
_COPY = "copy it from a source image, or use derive_series"


def check_result(header: Header) -> None:
    """Raises InvalidDataset, with the SOPInstanceUID, the attribute and what helps."""
    sop_class = UID(header.text(0x00080016))
    is_private = bool(sop_class) and sop_class.is_private
    has_study = sop_class not in _OF_NO_PATIENT and not is_private
    for tag, remedy in _UIDS.items():
        if has_study or tag >> 16 == 0x0008:
            _check_uid(header, tag, remedy)
    if not has_study:
        return
    if not f"{sop_class}.".startswith(_SECONDARY_CAPTURE) and not header.text(_MODALITY):
        remedy = "copy it from a source image, or set what this object is, such as SEG or SR"
        raise _wrong(header, _MODALITY, "is missing or empty", remedy)
    pixels = [tag for tag in _PIXELS if tag in header]
    for tag in pixels:
        _check_pixels(header, tag)
    if not pixels and "Image Storage" in sop_class.name and _PROVIDER_URL not in header:
        raise _wrong(header, _PIXEL_DATA, f"is missing in a {sop_class.name} object", "set it")


def _check_uid(header: Header, tag: int, remedy: str) -> None:
    value = header.text(tag)
    if not value:
        raise _wrong(header, tag, "is missing or empty", remedy)
    if not is_uid(value):
        raise _wrong(header, tag, f"is {value!r:.80}, which is no UID", remedy)


def _check_pixels(header: Header, tag: int) -> None:
    samples, photometric = _number(header, "SamplesPerPixel"), header.text(0x00280004)
    if not photometric:
        raise _wrong(header, 0x00280004, "is missing or empty", _COPY)
    if samples != _SAMPLES.get(photometric, samples):
        told = f"is {samples}, and PhotometricInterpretation {photometric:.16}"
        raise _wrong(header, tag_of("SamplesPerPixel"), told, "make them fit each other")
    if samples > 1:
        _number(header, "PlanarConfiguration", least=0)
    bits = _PIXELS[tag] or _number(header, "BitsAllocated")
    if tag == _PIXEL_DATA:
        _check_bits(header, bits)
    frames = _frames(header)
    rows, columns = _number(header, "Rows"), _number(header, "Columns")
    found = header.pixel_length
    if found is None:
        # Of compressed frames no length is known beforehand.
        return
    # Of each pair of pixels both have a Y, and share Cb and Cr (PS3.3 C.7.6.3.1.2).
    per_pixel = 2 if photometric.endswith("_422") else samples
    wanted = math.ceil(rows * columns * per_pixel * frames * bits / 8)
    if found != wanted + wanted % 2:
        raise _wrong(
            header,
            tag,
            f"has {found} bytes, and {frames} frames of Rows {rows} x Columns {columns} x SamplesPerPixel "
            f"{samples} with {bits} bits each take {wanted}",
            "give these attributes the shape and type of the array that was stored, or the other way round",
        )


def _check_bits(header: Header, bits: int) -> None:
    if bits != 1 and bits % 8:
        told = f"is {bits}, neither 1 nor a multiple of 8"
        raise _wrong(
            header, tag_of("BitsAllocated"), told, "set it to the bits of the array's type"
        )
    stored, high = _number(header, "BitsStored"), _number(header, "HighBit", least=0)
    if stored > bits or high >= bits:
        told = f"is {stored} with HighBit {high} and BitsAllocated {bits}"
        remedy = f"of values that fill them they are {bits}, {bits - 1} and {bits}"
        raise _wrong(header, tag_of("BitsStored"), told, remedy)
    _number(header, "PixelRepresentation", least=0)


def _frames(header: Header) -> int:
    tag = tag_of("NumberOfFrames")
    text = header.text(tag)
    if tag not in header:
        return 1
    if not re.fullmatch(r"\+?[0-9]{1,12}", text) or int(text) < 1:
        raise _wrong(header, tag, f"is {text!r:.20}", "set it to how many frames there are")
    return int(text)


def _number(header: Header, keyword: str, least: int = 1) -> int:
    tag = tag_of(keyword)
    number = header_number(header, tag)
    if number is None:
        raise _wrong(header, tag, "is missing or empty", _COPY)
    if number < least:
        raise _wrong(header, tag, f"is {number}", _COPY)
    return number


def _wrong(header: Header, tag: int, told: str, remedy: str) -> InvalidDataset:
    uid = header.text(0x00080018) or "without SOPInstanceUID"
    return InvalidDataset(f"result {uid:.80}: {tag_name(tag)} {told}; {remedy}")
