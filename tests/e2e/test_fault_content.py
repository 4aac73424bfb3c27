"""C1 to C20 of the fault model: what an image says about itself, and what the node makes of it.

C3, C5, C7, C9 and C11 are also in test_statuses.py, C15 and C16 in tests/unit/test_color.py and
tests/unit/test_codecs.py, C6 and C8 in the tests of completeness.
"""

import os
import random
import re
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.data import get_charset_files
from tests.e2e import wire
from tests.e2e.test_fault_wire import Never, Node, node_of, quiet
from tests.e2e.wire import Raw, bare, unharmed

from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

__all__ = ["quiet"]
ERROR = r"dicomnode\.errors\.\w+: "
LONG = {"OB", "OW", "SQ", "UN", "UT", "OF", "UC"}
Element = tuple[str, bytes]


def element(tag: int, vr: str, data: bytes, length: int | None = None) -> bytes:
    """An element in Explicit VR Little Endian, of whatever length it claims."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    size = len(data) if length is None else length
    return head + (struct.pack("<HI", 0, size) if vr in LONG else struct.pack("<H", size)) + data


def even(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return data + b" " * (len(data) % 2)


def us(number: int) -> Element:
    return "US", struct.pack("<H", number)


def elements(uid: str = "1.2.3", **_: object) -> dict[int, Element]:
    """A CT image of 4 x 4 cells."""
    return {
        0x00080016: ("UI", wire.CT.encode() + b"\0"),
        0x00080018: ("UI", uid.encode() + b"\0" * (len(uid) % 2)),
        0x00080060: ("CS", b"CT"),
        0x00100020: ("LO", b"WIRE"),
        0x0020000D: ("UI", b"1.2.3.4\0"),
        0x0020000E: ("UI", b"1.2.3.5\0"),
        0x00200013: ("IS", b"1 "),
        0x00200032: ("DS", b"0\\0\\0 "),
        0x00200037: ("DS", b"1\\0\\0\\0\\1\\0 "),
        0x00280002: us(1),
        0x00280004: ("CS", b"MONOCHROME2 "),
        0x00280010: us(4),
        0x00280011: us(4),
        0x00280030: ("DS", b"1\\1 "),
        0x00280100: us(16),
        0x00280101: us(16),
        0x00280102: us(15),
        0x00280103: us(0),
        0x7FE00010: ("OW", bytes(32)),
    }


def dataset(changes: dict[int, Element | None] | None = None, uid: str = "1.2.3") -> bytes:
    """That image with some elements changed or left out."""
    made: dict[int, Element | None] = {**elements(uid), **(changes or {})}
    return b"".join(element(tag, *one) for tag, one in sorted(made.items()) if one is not None)


def answer(node: AbstractPipeline, data: bytes, uid: str | bytes = "1.2.3") -> int:
    """The status of one image."""
    with Raw(node).open() as peer:
        peer.send(wire.store(uid, data))
        status = peer.status()
        peer.release()
    return status


def safe(root: Path) -> bool:
    """Whether all that is below a folder has names that we made."""
    names = [path.name for path in root.rglob("*")]
    return all(re.fullmatch(r"[A-Za-z0-9._~%=-]{1,255}", name) for name in names)


HOSTILE = [
    "../../x", "/etc/x", "..", ".", "1.2\0.3", "1.2\n3", "9" * 65, "CON", "1.2.é", "", " ",
    "1..2", "1.2.", "-1.2", "1.2;rm -rf", "<b>1</b>", "%2e%2e", "1.2/../3",
]  # fmt: skip


def test_c1_a_uid_that_is_none_is_refused_and_never_a_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with node_of(root_data_directory=root) as node:
        for k, uid in enumerate(HOSTILE):
            data = dataset({0x00080018: ("UI", even(uid)), 0x0020000E: ("UI", even(uid))})
            assert answer(node, data, uid.encode()) in (0x0117, 0xA900), uid
            # In the dataset only.
            assert answer(node, data) == 0xA900, uid
            # The UID of a series names nothing.
            series = dataset({0x0020000E: ("UI", even(uid))}, f"1.2.{k}")
            assert answer(node, series, f"1.2.{k}") in (0x0000, 0xC000), uid
    assert safe(root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_c1_a_uid_with_leading_zeros_is_taken_since_there_are_such() -> None:
    with node_of() as node:
        assert answer(node, dataset(uid="01.2"), "01.2") == 0x0000


def test_c1_an_identifier_of_any_bytes_is_never_a_path(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with node_of(root_data_directory=root) as node:
        identifiers = [*HOSTILE, "A" * 64, "\xff\xfe", "P\\..\\x", "a\tb"]
        for k, identifier in enumerate(identifiers):
            value = even(identifier.encode("latin-1"))
            data = dataset({0x00100020: ("LO", value)}, f"1.2.{k}")
            assert answer(node, data, f"1.2.{k}") in (0x0000, 0xB007), identifier
    assert safe(root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_c2_a_request_that_differs_from_its_dataset_is_a900() -> None:
    with node_of() as node:
        assert answer(node, dataset(), "1.2.4") == 0xA900
        assert answer(node, dataset({0x00080016: ("UI", even(wire.MR))})) == 0xA900
        assert answer(node, dataset({0x00080016: None})) in (0xA900, 0xC000)
        assert answer(node, dataset({0x00080018: None})) in (0xA900, 0xC000)


def test_c3_an_empty_dataset_or_noise_is_c000() -> None:
    chance = random.Random(3)
    with node_of() as node:
        for data in (b"", b"\0", *(chance.randbytes(k) for k in (9, 100, 5000))):
            # Noise may by chance read as elements without the UIDs of an image.
            assert answer(node, data) in (0xC000, 0xA900)


@pytest.mark.parametrize(
    "value", [None, ("LO", b""), ("LO", b"    "), ("LO", b"\0\0"), ("LO", b"\\ ")]
)
def test_c4_no_identifier_is_b007_and_never_success(value: Element | None) -> None:
    """Of the fault model's 0xC000 we make a warning, so that senders do not stop at one image."""
    with node_of() as node:
        assert answer(node, dataset({0x00100020: value})) == 0xB007


def test_c4_an_identifier_of_two_values_is_one_text() -> None:
    with node_of() as node:
        assert answer(node, dataset({0x00100020: ("LO", b"A\\B ")})) == 0x0000
        assert "A\\B" in [case.identifier for case in node.cases()]


def test_c5_what_no_input_takes_is_b006_over_the_wire() -> None:
    """A warning in place of 0xA900, so that senders do not stop; 0x0000 never."""
    with node_of() as node:
        assert answer(node, dataset({0x00080060: ("CS", b"PT")})) == 0xB006


def test_c7_other_content_under_a_uid_is_0111_and_the_first_stays(tmp_path: Path) -> None:
    with node_of(root_data_directory=tmp_path) as node:
        first = dataset()
        assert answer(node, first) == 0x0000
        assert answer(node, dataset({0x7FE00010: ("OW", b"\1" * 32)})) == 0x0111
        assert answer(node, first) == 0x0000
        (file,) = tmp_path.glob("*WIRE*/ct/*.dcm")
        assert bare(file.read_bytes()) == first


def nested(depth: int, form: str) -> bytes:
    """A sequence within a sequence, so many times."""
    if form == "undefined":
        start = element(0x00081140, "SQ", b"", 0xFFFFFFFF)
        start += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        end = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
        return start * depth + end * depth
    parts = []
    size = 0
    for _ in range(depth):
        if form == "implicit":
            head = struct.pack("<HHI", 0x0008, 0x1140, size + 8)
        else:
            head = element(0x00081140, "SQ", b"", size + 8)
        parts.append(head + struct.pack("<HHI", 0xFFFE, 0xE000, size))
        size += len(parts[-1])
    return b"".join(reversed(parts))


@pytest.mark.parametrize("form", ["defined", "undefined", "implicit"])
@pytest.mark.parametrize("depth", [60, 66, 1000, 20_000])
def test_c9_sequences_deeper_than_64_are_c000_within_a_moment(depth: int, form: str) -> None:
    asked = [(1, wire.VERIFICATION, (wire.IMPLICIT,)), (3, wire.CT, (wire.EXPLICIT,))]
    data = dataset({0x00080060: None})[:60]
    if form == "implicit":
        asked[1] = (3, wire.CT, (wire.IMPLICIT,))
        data = struct.pack("<HHI", 8, 0x16, 26) + wire.CT.encode() + b"\0"
        data += struct.pack("<HHI", 8, 0x18, 6) + b"1.2.3\0"
    else:
        data = element(0x00080016, "UI", wire.CT.encode() + b"\0")
        data += element(0x00080018, "UI", b"1.2.3\0")
    data += nested(depth, form)
    with node_of() as node, Raw(node).open(wire.request(contexts=asked)) as peer:
        start = time.process_time()
        peer.send(wire.store("1.2.3", data))
        status = peer.status()
        assert time.process_time() - start < 1
        if depth > 64:
            assert status == 0xC000
        else:
            # It is understood, and has no identifier.
            assert status == 0xB007


@pytest.mark.parametrize("items", [100_000, 1_100_000])
def test_c10_many_items_take_no_second_and_too_many_are_c000(items: int) -> None:
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    data = dataset({0x00081140: ("SQ", item * items)})
    with node_of() as node:
        start = time.process_time()
        status = answer(node, data)
        assert time.process_time() - start < 5
        assert status == (0 if items == 100_000 else 0xC000)


def test_c11_lengths_that_lie_are_c000() -> None:
    whole = dataset({0x7FE00010: None})
    with node_of() as node:
        for lying in (
            element(0x7FE00010, "OW", bytes(10), 0xFFFFFFF0),
            element(0x7FE00010, "OW", bytes(10), 32),
            element(0x7FE00010, "OB", b"", 0xFFFFFFFF),
            element(0x00290010, "LO", b"x ", 0xFFFF),
            element(0x00081140, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, 100), 8),
        ):
            assert answer(node, whole + lying) == 0xC000


class One(AbstractInput):
    image_grinder = numpy_grinder

    def validate(self) -> bool:
        return self.images >= 1


class Grinding(AbstractPipeline):
    ae_title = "NODE"
    input = {"ct": One}
    log_level = "CRITICAL"

    def process(self, input_data: dict[str, Any]) -> None:
        self.last = numpy.asarray(input_data["ct"])


def fails(data: bytes, told: str, syntax: str = wire.EXPLICIT) -> None:
    """An image is stored, its case fails with an error that tells this, and the node goes on."""
    with running_node(Grinding) as node:
        _fails(node, data, told, syntax)
        assert answer(node, dataset({0x00100020: ("LO", b"NEXT")}, "1.2.9"), "1.2.9") == 0x0000
        wait_for_cases(node, State.DONE)


def _fails(node: Grinding, data: bytes, told: str, syntax: str) -> None:
    asked = [(1, wire.VERIFICATION, (wire.IMPLICIT,)), (3, wire.CT, (syntax,))]
    before = wire.resident()
    with Raw(node).open(wire.request(contexts=asked)) as peer:
        peer.send(wire.store("1.2.3", data))
        status = peer.status()
        assert status in (0x0000, 0xC000)
        peer.release()
    if status == 0:
        wait_for_cases(node, State.FAILED)
        (case,) = node.cases()
        assert re.search(told, case.error), case.error[-800:]
        assert "1.2.3" in case.error
    assert wire.resident() - before < 256 << 20


@pytest.mark.parametrize("size", [0, 2, 30])
def test_c11_pixels_that_are_too_short_are_c000_and_the_whole_image_is_taken_then(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_node(Grinding, root_data_directory=tmp_path, log_level="WARNING") as node:
        assert answer(node, dataset({0x7FE00010: ("OW", bytes(size))})) == 0xC000
        assert f"'1.2.3' answered 0xC000: PixelData lacks {32 - size} bytes" in caplog.text
        assert not node.cases()
        assert answer(node, dataset()) == 0x0000
        wait_for_cases(node, State.DONE)


def test_c11_a_large_image_that_is_too_short_is_c000_too(tmp_path: Path) -> None:
    lines = struct.pack("<H", 2200)
    wide = {0x00280010: ("US", lines), 0x00280011: ("US", lines)}
    with node_of(root_data_directory=tmp_path) as node:
        assert answer(node, dataset({**wide, 0x7FE00010: ("OW", bytes(5 << 20))})) == 0xC000
        assert answer(node, dataset({**wide, 0x7FE00010: ("OW", bytes(10 << 20))})) == 0x0000


def test_c12_a_deflated_bomb_is_not_taken() -> None:
    deflated = [(3, wire.CT, ("1.2.840.10008.1.2.1.99",))]
    with node_of() as node, Raw(node).open(wire.request(contexts=deflated)) as peer:
        peer.send(wire.store("1.2.3", bytes(1 << 20)))
        # Nothing was accepted that it could be sent over.
        assert [kind for kind, _ in peer.until_the_end()] in ([wire.ABORT], [])


@pytest.mark.parametrize("size", [16, 5 << 20])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", wire.EXPLICIT])
def test_c12_a_dataset_that_brings_a_transfer_syntax_of_its_own_is_c000(
    syntax: str, size: int, tmp_path: Path
) -> None:
    """In the file it would count in place of the one that the dataset came in."""
    meta = element(0x00020010, "UI", syntax.encode() + b"\0" * (len(syntax) % 2))
    data = dataset({0x00290010: ("LO", b"PRIVATE "), 0x00291010: ("OB", os.urandom(size))})
    if syntax.endswith(".99"):
        deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        data = deflate.compress(data) + deflate.flush()
    with node_of(root_data_directory=tmp_path) as node:
        assert answer(node, meta + data) == 0xC000
        assert "WIRE" not in [case.identifier for case in node.cases()]
    assert not list((tmp_path / ".dicomnode" / "incoming").iterdir())


@pytest.mark.parametrize("size", [32, 5 << 20])
@pytest.mark.parametrize(
    "second",
    [
        element(0x00100020, "LO", b"OTHER "),
        element(0x00281053, "DS", b"2 "),
        element(0x7FE00010, "OW", bytes(32)),
    ],
)
def test_what_a_header_tells_after_the_pixels_is_c000(
    second: bytes, size: int, tmp_path: Path
) -> None:
    """Some readers take the first patient or slope of an object, some the last."""
    data = dataset({0x7FE00010: ("OW", bytes(size))})
    padding = element(0xFFFCFFFC, "OB", b"\0" * 10)
    with node_of(root_data_directory=tmp_path) as node:
        assert answer(node, data + second) == 0xC000
        assert "WIRE" not in [case.identifier for case in node.cases()]
        assert answer(node, data + padding + bytes(64)) == 0x0000


def test_of_two_patients_before_the_pixels_the_one_counts_that_the_pipeline_sees() -> None:
    both = element(0x00100020, "LO", b"FIRST ") + element(0x00100020, "LO", b"SECOND")
    first = element(0x00100020, "LO", b"WIRE")
    with node_of() as node:
        status = answer(node, dataset().replace(first, both))
        assert status in (0x0000, 0xC000)
        if status == 0:
            assert {"SECOND"} == {case.identifier for case in node.cases()} - {"PHANTOM-1"}


RLE, JPEG2000, JPEG = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"


def encapsulated(frame: bytes, table: bytes = b"") -> bytes:
    items = b"".join(
        struct.pack("<HHI", 0xFFFE, 0xE000, len(one)) + one for one in (table, even(frame))
    )
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return element(0x7FE00010, "OB", b"", 0xFFFFFFFF) + items + end


@pytest.mark.parametrize("syntax", [RLE, JPEG2000, JPEG])
def test_c13_few_bytes_that_claim_many_pixels_fail_and_take_no_memory(syntax: str) -> None:
    changes: dict[int, Element | None] = {
        0x00280008: ("IS", b"1000000 "),
        0x00280010: us(65535),
        0x00280011: us(65535),
        0x7FE00010: None,
    }
    fails(dataset(changes) + encapsulated(bytes(100)), ERROR, syntax)


STRANGE: dict[str, dict[int, Element | None]] = {
    "rows as UL": {0x00280010: ("UL", struct.pack("<I", 0x10004))},
    "no rows": {0x00280010: us(0)},
    "rows that are negative": {0x00280010: ("SS", struct.pack("<h", -4))},
    "rows that are missing": {0x00280010: None},
    "rows that are text": {0x00280010: ("LO", b"four")},
    "bits 7": {0x00280100: us(7)},
    "bits 64": {0x00280100: us(64)},
    "bits 0": {0x00280100: us(0)},
    "more bits than there are": {0x00280101: us(17), 0x00280102: us(16)},
    "high bit beyond": {0x00280102: us(16)},
    "a signedness of 9": {0x00280103: us(9)},
    "many samples": {0x00280002: us(65535)},
    "frames in floating point": {0x00280008: ("IS", b"1e9 ")},
    "frames that are negative": {0x00280008: ("IS", b"-1")},
    "frames of 65,000 digits": {0x00280008: ("IS", b"9" * 65000)},
    "frames without end": {0x00280008: ("IS", b"2147483647 ")},
    "a slope of text": {0x00281053: ("DS", b"one "), 0x00281052: ("DS", b"0 ")},
    "a slope that is no number": {0x00281053: ("DS", b"nan "), 0x00281052: ("DS", b"0 ")},
    "a slope without end": {0x00281053: ("DS", b"1e999 "), 0x00281052: ("DS", b"0 ")},
}


@pytest.mark.parametrize("name", STRANGE)
def test_c14_numbers_that_cannot_be_are_an_error_that_names_the_image(name: str) -> None:
    fails(dataset(STRANGE[name]), ERROR)


@pytest.mark.parametrize(
    "pixels",
    [
        encapsulated(b"\xff\xd8\xff\xd9", struct.pack("<II", 0, 0xFFFFFFF0)),
        encapsulated(b"\xff\xd8\xff\xd9", struct.pack("<II", 9, 3)),
        encapsulated(b"\xff\xd8\xff\xd9", b"odd"),
        encapsulated(b"")[:-8],
        encapsulated(b"\xff\xd8")[:-12],
        element(0x7FE00010, "OB", bytes(40), 0xFFFFFFFF),
        element(0x7FE00010, "OB", b""),
    ],
    ids=range(7),
)
def test_c16_fragments_that_make_no_frames_fail_their_case(pixels: bytes) -> None:
    frames: dict[int, Element | None] = {0x00280008: ("IS", b"2 "), 0x7FE00010: None}
    fails(dataset(frames) + pixels, ERROR, JPEG)


@pytest.mark.parametrize(
    ("syntax", "is_taken"),
    [
        ("1.2.840.10008.1.2.2", True),
        ("1.2.840.10008.1.2.4.80", True),
        ("1.2.840.10008.1.2.4.201", True),
        ("1.2.840.10008.1.2.4.102", True),
        ("1.2.840.113619.5.2", False),
        ("1.3.46.670589.33.1.4.1", False),
        ("1.2.3.4.5", False),
    ],
)
def test_c17_a_syntax_is_kept_bit_by_bit_or_its_context_is_rejected(
    syntax: str, is_taken: bool, tmp_path: Path
) -> None:
    image = make_series(1)[0]
    data = dataset({0x7FE00010: None}) + encapsulated(b"not decoded here")
    uid = "1.2.3"
    if syntax == "1.2.840.10008.1.2.2":
        image.file_meta.TransferSyntaxUID = syntax
        pixels = numpy.frombuffer(image.PixelData, "<u2").astype(">u2").tobytes()
        image.PixelData, uid = pixels, str(image.SOPInstanceUID)
        file = pydicom.filebase.DicomBytesIO()
        file.is_little_endian, file.is_implicit_VR = False, False
        image._is_little_endian = False
        for tag in list(image.keys()):
            image[tag]
        pydicom.filewriter.write_dataset(file, image)
        data = file.getvalue()
    asked = [(3, wire.CT, (syntax,)), (5, wire.CT, (wire.EXPLICIT,))]
    with (
        node_of(root_data_directory=tmp_path, input={"all": Any_}) as node,
        Raw(node).open(wire.request(contexts=asked)) as peer,
    ):
        peer.send(wire.store(uid, data))
        if not is_taken:
            assert [kind for kind, _ in peer.until_the_end()] in ([wire.ABORT], [])
            return
        assert peer.status() == 0
        (file_path,) = [
            path for path in tmp_path.glob("*/all/*.dcm") if syntax.encode() in path.read_bytes()
        ]
        assert bare(file_path.read_bytes()) == data


class Any_(Never):
    required_values = {}
    required_tags = [0x00080018]


@pytest.mark.parametrize("path", get_charset_files("*.dcm"), ids=lambda one: Path(one).name)
def test_c18_any_character_set_is_kept_as_bytes_and_harms_nobody(
    path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original = pydicom.dcmread(path)
    original.remove_private_tags()
    for keyword in ("Rows", "PixelData"):
        if keyword in original:
            del original[keyword]
    original.SOPClassUID, original.SOPInstanceUID = wire.CT, "1.2.3"
    if not original.get("PatientID"):
        original.PatientID = "NOBODY"
    charset = original.get("SpecificCharacterSet")
    del charset
    data = bare(encode(original)[0])
    with node_of(root_data_directory=tmp_path, input={"all": Any_}, log_level="DEBUG") as node:
        assert answer(node, data) == 0x0000
        (file,) = [
            one for one in tmp_path.glob("*/all/*.dcm") if b"1.2.3\0" in one.read_bytes()[300:900]
        ]
        assert bare(file.read_bytes()) == data
        assert node.cases()
    name = str(original.get("PatientName", ""))
    assert len(name) < 4 or name not in capfd.readouterr().out


@pytest.mark.parametrize(
    "charset", [b"NONE_SUCH ", b"ISO 2022 IR 87\\ISO_IR 999 ", b"\\\\", b"\xff\xff"]
)
def test_c18_a_character_set_that_nobody_knows_is_kept_as_it_is(
    charset: bytes, tmp_path: Path
) -> None:
    data = dataset({0x00080005: ("CS", charset), 0x00100010: ("PN", b"\x1b$B\xff\xfe^x ")})
    with node_of(root_data_directory=tmp_path) as node:
        assert answer(node, data) == 0x0000
        (file,) = tmp_path.glob("*WIRE*/ct/*.dcm")
        assert bare(file.read_bytes()) == data


def test_c19_the_dataset_is_kept_bit_by_bit(tmp_path: Path) -> None:
    changes: dict[int, Element | None] = {
        # A group length that is wrong, an odd length, retired and private elements, padding.
        0x00080000: ("UL", struct.pack("<I", 12345)),
        0x00080001: ("UL", struct.pack("<I", 1)),
        0x00080010: ("SH", b"RET"),
        0x00100010: ("PN", b"A^B\0\0\0"),
        0x00290010: ("LO", b"PRIVATE "),
        0x00291001: ("UN", b"\xfe\xff\0\xe0" * 3),
        0xFFFCFFFC: ("OB", bytes(126)),
    }
    data = dataset(changes)
    with node_of(root_data_directory=tmp_path) as node:
        assert answer(node, data) == 0x0000
        (file,) = tmp_path.glob("*WIRE*/ct/*.dcm")
        assert bare(file.read_bytes()) == data


def test_c20_a_preamble_is_never_kept_and_files_are_private(
    tmp_path: Path, peer: Callable[[str], str]
) -> None:
    (image,) = make_series(1)
    data = bytearray(encode(image)[0])
    data[:4] = b"\x7fELF"
    data[64:66] = b"MZ"
    file = tmp_path / "polyglot.dcm"
    file.write_bytes(data)
    root = tmp_path / "root"
    with running_node(Node, root_data_directory=root) as node, unharmed(node):
        sender = [peer("storescu"), "-aec", "NODE", "127.0.0.1", str(node.port), str(file)]
        subprocess.run(sender, check=True, timeout=60)
        assert [one.status for one in send(address_of(node), [pydicom.dcmread(file)])] == [0]
        kept = [
            one
            for one in root.glob("*/ct/*.dcm")
            if image.SOPInstanceUID in one.read_text("latin-1")
        ]
        for path in kept:
            assert path.read_bytes()[:132] == bytes(128) + b"DICM"
            assert path.stat().st_mode & 0o777 == 0o600
        assert len(kept) == 1
        for folder in (root, *kept[0].parents[:2]):
            assert folder.stat().st_mode & 0o077 == 0, folder
