"""Objects that tell in a way of their own where their slices lie: mosaics, NM, concatenations."""

import contextlib
import copy
import gzip
import io
import math
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid
from tests.unit.test_multiframe import OBLIQUE, enhanced, item, made, same
from tests.unit.test_volume import distinct

from dicomnode.errors import DicomnodeError, InconsistentSeries, UnsupportedImage
from dicomnode.lib.dicom import LazyDataset, encode
from dicomnode.lib.grinders import numpy_grinder, series_grinder, volume_grinder
from dicomnode.lib.layouts import csa_fields
from dicomnode.lib.volume import Volume
from dicomnode.testing import make_series


def lazy(datasets: Iterable[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


@pytest.fixture(params=[list, lazy])
def kind(request: pytest.FixtureRequest) -> Callable[[Iterable[Dataset]], list[Dataset]]:
    return request.param


# Mosaics


def csa(fields: dict[str, list[str]], newer: bool = True) -> bytes:
    """A CSA header, written out."""
    data = b"SV10\x04\x03\x02\x01" if newer else b""
    data += struct.pack("<II", len(fields), 77)
    first = None
    for name, texts in fields.items():
        items = max(len(texts), 6)
        first = items if first is None else first
        data += struct.pack(
            "<64si4siii", name.encode(), len(texts), b"FD\0\0", 3, items, 77 if newer else 205
        )
        for k in range(items):
            text = texts[k].encode() + b"\0" if k < len(texts) else b""
            length = len(text)
            data += struct.pack("<4i", *((length,) * 4 if newer else (length + first, 0, 77, 0)))
            data += text + bytes(-length % 4)
    return data


def mosaic(
    series: list[Dataset], *, newer: bool = True, reverse: bool = False, with_csa: bool = True
) -> Dataset:
    """The slices of a series as the tiles of one picture; with `reverse` the last one first."""
    tiles = series[::-1] if reverse else series
    first = tiles[0]
    across = math.ceil(math.sqrt(len(tiles)))
    rows, columns = first.Rows, first.Columns
    picture = numpy.zeros((across * rows, across * columns), "<u2")
    for k, one in enumerate(tiles):
        cells = numpy.frombuffer(one.PixelData, "<u2")[: rows * columns].reshape(rows, columns)
        top, left = k // across * rows, k % across * columns
        picture[top : top + rows, left : left + columns] = cells
    one = copy.deepcopy(first)
    one.SOPInstanceUID = generate_uid()
    one.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    one.Rows, one.Columns = picture.shape
    one.PixelData = picture.tobytes()
    axes = numpy.array(one.ImageOrientationPatient, float)
    row_mm, column_mm = map(float, one.PixelSpacing)
    corner = numpy.array(one.ImagePositionPatient, float)
    corner -= axes[3:] * row_mm * (picture.shape[0] - rows) / 2
    corner -= axes[:3] * column_mm * (picture.shape[1] - columns) / 2
    one.ImagePositionPatient = [f"{value:.9g}" for value in corner]
    one.SpacingBetweenSlices = "2.5"
    normal = numpy.cross(axes[:3], axes[3:]) * (-1 if reverse else 1)
    if with_csa:
        fields = {
            "NumberOfImagesInMosaic": [str(len(tiles))],
            "SliceNormalVector": [f"{value:.8f}" for value in normal],
        }
        block = one.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", csa(fields, newer))
    return one


def nearly_same(found: Volume, expected: Volume) -> None:
    numpy.testing.assert_array_equal(found.array, expected.array)
    numpy.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("slices", [1, 4, 7])
def test_g26_g58_the_tiles_of_a_mosaic_are_slices(
    kind: Callable, slices: int, reverse: bool, newer: bool
) -> None:
    series = distinct(make_series(slices, 9, 11, orientation=OBLIQUE))
    for one in series:
        one.SpacingBetweenSlices = "2.5"
    one = mosaic(series, newer=newer, reverse=reverse)
    volume = volume_grinder(kind([one]))
    nearly_same(volume, volume_grinder(series))
    order = list(range(1, slices + 1))
    assert volume.frame_numbers == tuple(order[::-1] if reverse else order)
    assert set(volume.sop_instance_uids) == {one.SOPInstanceUID}
    numpy.testing.assert_array_equal(numpy_grinder(kind([one])), volume.array)
    out = numpy.empty(volume.shape, "u2")
    assert volume_grinder(kind([one]), values="stored", out=out).array is out
    picture = numpy_grinder(kind([one]), order="given", values="stored", dtype="u2")
    assert picture.tobytes() == one.PixelData


def test_g42_g58_mosaics_of_several_times_are_a_volume_each(kind: Callable) -> None:
    first = distinct(make_series(7, 9, 11))
    times = [first, distinct([copy.deepcopy(one) for one in first], seed=8)]
    given = []
    for k, series in enumerate(times):
        given.append(mosaic(series))
        given[-1].AcquisitionNumber = k + 1
    with pytest.raises(InconsistentSeries, match='split_by="AcquisitionNumber"'):
        volume_grinder(kind(given))
    for found in (
        series_grinder(kind(given)), series_grinder(kind(given), split_by="AcquisitionNumber")
    ):  # fmt: skip
        assert list(found) == [1, 2]
        for volume, series in zip(found.values(), times, strict=True):
            nearly_same(volume, volume_grinder(series))


def no_csa(one: Dataset) -> None:
    del one[0x00291010]


def damaged(one: Dataset) -> None:
    one[0x00291010].value = one[0x00291010].value[:150]


def huge(one: Dataset) -> None:
    one[0x00291010].value = b"SV10\x04\x03\x02\x01\xff\xff\xff\x7f\x4d\0\0\0" + bytes(100)


def another_normal(one: Dataset) -> None:
    one[0x00291010].value = csa(
        {"NumberOfImagesInMosaic": ["7"], "SliceNormalVector": ["1", "0", "0"]}
    )


def too_many(one: Dataset) -> None:
    one[0x00291010].value = csa(
        {"NumberOfImagesInMosaic": ["17"], "SliceNormalVector": ["0", "0", "1"]}
    )


def no_spacing(one: Dataset) -> None:
    del one.SpacingBetweenSlices


@pytest.mark.parametrize("change", [no_csa, damaged, huge, another_normal, too_many, no_spacing])
def test_g58_a_mosaic_that_does_not_tell_its_slices_is_an_error(
    kind: Callable, change: Callable
) -> None:
    one = mosaic(distinct(make_series(7, 9, 11)))
    change(one)
    for grinder in (volume_grinder, numpy_grinder, series_grinder):
        with pytest.raises(InconsistentSeries, match=r"mosaic|SliceNormalVector") as told:
            grinder(kind([one]))
        assert one.SOPInstanceUID in str(told.value)


@pytest.mark.parametrize("newer", [True, False])
def test_g58_a_damaged_csa_header_is_an_error_and_never_a_crash(newer: bool) -> None:
    data = csa({"A": ["1"], "SliceNormalVector": ["0", "0", "1"]}, newer)
    assert csa_fields(data)["SliceNormalVector"] == ["0", "0", "1"]
    random = numpy.random.default_rng(1)
    for _ in range(2000):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4):
            broken[place] = random.integers(0, 256)
        with contextlib.suppress(ValueError, struct.error):
            csa_fields(bytes(broken[: random.integers(0, len(data) + 1)]))


def nibabel_files() -> list[Path]:
    nibabel = pytest.importorskip("nibabel")
    return sorted((Path(nibabel.__file__).parent / "nicom" / "tests" / "data").glob("siemens_dwi*"))


def test_g58_real_mosaics_are_what_nibabel_and_dcm2niix_read(
    peer: Callable[[str], str], tmp_path: Path
) -> None:
    nibabel = pytest.importorskip("nibabel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nibabel.nicom import dicomwrappers
    files = nibabel_files()
    assert len(files) == 2
    for path in files:
        data = gzip.decompress(path.read_bytes())
        volume = volume_grinder([LazyDataset(data)])
        wrapped = dicomwrappers.wrapper_from_data(pydicom.dcmread(io.BytesIO(data)))
        numpy.testing.assert_array_equal(volume.array, wrapped.get_data().transpose(2, 0, 1))
        # nibabel's first axis is the row, and it writes 1e-5 of a cosine otherwise.
        numpy.testing.assert_allclose(volume.affine, wrapped.affine[:, [1, 0, 2, 3]], atol=1e-4)
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / "one.dcm").write_bytes(data)
        subprocess.run(
            [peer("dcm2niix"), "-b", "n", "-f", "out", "-o", folder, folder],
            check=True, capture_output=True,
        )  # fmt: skip
        image = nibabel.load(folder / "out.nii")
        numpy.testing.assert_array_equal(
            numpy.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1], volume.array
        )
        for column, row, k in ((0, 0, 0), (127, 0, 47), (30, 90, 20)):
            expected = image.affine @ (column, 127 - row, k, 1) * (-1, -1, 1, 1)
            numpy.testing.assert_allclose(volume.affine @ (column, row, k, 1), expected, atol=2e-3)


def test_g44_b_values_of_real_mosaics() -> None:
    given = [LazyDataset(gzip.decompress(path.read_bytes())) for path in nibabel_files()]
    found = series_grinder(
        given, split_by=("DiffusionBValue", "DiffusionGradientOrientation", "SeriesInstanceUID")
    )
    assert [key[0] for key in found] == [0.0, 1000.0]
    assert [len(volume.array) for volume in found.values()] == [48, 48]
    assert sum(part**2 for part in list(found)[1][1]) == pytest.approx(1, abs=1e-4)


# Nuclear medicine


def reconstruction(series: list[Dataset], spacing: str, slots: int = 1) -> Dataset:
    """The slices as frames of an NM object; the first one is where its detector says."""
    one = copy.deepcopy(series[0])
    one.SOPInstanceUID, one.SOPClassUID = generate_uid(), "1.2.840.10008.5.1.4.1.1.20"
    one.Modality = "NM"
    one.ImageType = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
    del one.ImagePositionPatient, one.ImageOrientationPatient, one.RescaleSlope
    del one.RescaleIntercept
    count = len(series) // slots
    one.NumberOfFrames = len(series)
    one.FrameIncrementPointer = [0x00540080]
    one.SliceVector = [k % count + 1 for k in range(len(series))]
    if slots > 1:
        one.TimeSlotVector = [k // count + 1 for k in range(len(series))]
        one.FrameIncrementPointer = [0x00540070, 0x00540080]
        one.ImageType = ["ORIGINAL", "PRIMARY", "RECON GATED TOMO", "EMISSION"]
    one.SpacingBetweenSlices = spacing
    one.DetectorInformationSequence = Sequence(
        [
            item(
                ImagePositionPatient=series[0].ImagePositionPatient,
                ImageOrientationPatient=series[0].ImageOrientationPatient,
            )
        ]
    )
    one.PixelData = b"".join(single.PixelData for single in series)
    return one


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_g59_slices_of_nuclear_medicine_lie_on_the_side_that_the_sign_tells(
    kind: Callable, sign: int, shuffle: bool
) -> None:
    series = distinct(make_series(6, 8, 10, orientation=OBLIQUE))[::sign]
    one = reconstruction(series, f"{sign * 2.5}")
    if shuffle:
        order = [3, 0, 5, 1, 4, 2]
        one.SliceVector = [k + 1 for k in order]
        one.PixelData = b"".join(series[k].PixelData for k in order)
    found = volume_grinder(kind([one]), values="stored")
    expected = volume_grinder(series, values="stored")
    numpy.testing.assert_array_equal(found.array, expected.array)
    numpy.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)


def test_g45_g59_gated_reconstructions_are_split_by_their_vector(kind: Callable) -> None:
    first = distinct(make_series(4, 8, 10))
    second = distinct([copy.deepcopy(one) for one in first], seed=9)
    one = reconstruction([*first, *second], "2.5", slots=2)
    with pytest.raises(InconsistentSeries, match="TimeSlotVector"):
        volume_grinder(kind([one]))
    for found in (
        series_grinder(kind([one])), series_grinder(kind([one]), split_by="TimeSlotVector")
    ):  # fmt: skip
        assert list(found) == [1, 2]
        for volume, series in zip(found.values(), (first, second), strict=True):
            expected = [float(numpy.frombuffer(s.PixelData, "<u2")[3]) for s in series]
            assert volume.array[:, 0, 3].tolist() == expected


def test_g59_two_detectors_have_two_places(kind: Callable) -> None:
    first = distinct(make_series(3, 8, 10))
    second = distinct(make_series(3, 8, 10, origin_mm=(0, 0, 0)), seed=9)
    one = reconstruction([*first, *second], "2.5", slots=2)
    one.DetectorVector = one.TimeSlotVector
    del one.TimeSlotVector
    one.DetectorInformationSequence.append(
        item(
            ImagePositionPatient=second[0].ImagePositionPatient,
            ImageOrientationPatient=second[0].ImageOrientationPatient,
        )
    )
    found = series_grinder(kind([one]), split_by="DetectorVector")
    numpy.testing.assert_allclose(found[1].affine, volume_grinder(first).affine)
    numpy.testing.assert_allclose(found[2].affine, volume_grinder(second).affine)


def no_nm_spacing(one: Dataset) -> None:
    one.SpacingBetweenSlices = None


def no_vector(one: Dataset) -> None:
    del one.SliceVector


def no_detector(one: Dataset) -> None:
    del one.DetectorInformationSequence


def no_place(one: Dataset) -> None:
    del one.DetectorInformationSequence[0].ImagePositionPatient


def projections(one: Dataset) -> None:
    one.ImageType = ["ORIGINAL", "PRIMARY", "TOMO", "EMISSION"]


@pytest.mark.parametrize(
    ("change", "told_as"),
    [
        (no_nm_spacing, "SpacingBetweenSlices"), (no_vector, "SliceVector"),
        (no_detector, "DetectorInformationSequence"), (no_place, "ImagePositionPatient"),
        (projections, "ImagePositionPatient"),
    ],
)  # fmt: skip
def test_g59_what_does_not_tell_its_slices_is_an_error(
    kind: Callable, change: Callable, told_as: str
) -> None:
    one = reconstruction(make_series(4, 8, 10), "2.5")
    change(one)
    with pytest.raises(InconsistentSeries, match=told_as) as told:
        volume_grinder(kind([one]))
    assert one.SOPInstanceUID in str(told.value)
    assert numpy_grinder(kind([one]), order="given").shape == (4, 8, 10)


# Concatenations


def parts(series: list[Dataset], sizes: list[int]) -> list[Dataset]:
    uid, cut, start = generate_uid(), [], 0
    for number, size in enumerate(sizes):
        one = enhanced(series, list(range(start, start + size)))
        one.ConcatenationUID, one.InConcatenationNumber = uid, number + 1
        one.InConcatenationTotalNumber = len(sizes)
        one.ConcatenationFrameOffsetNumber = start
        cut.append(one)
        start += size
    return cut


def test_g56_the_parts_of_a_concatenation_are_joined_in_any_order(kind: Callable) -> None:
    series = made()
    one = parts(series, [3, 2, 2])
    found = volume_grinder(kind([one[2], one[0], one[1]]))
    same(found, volume_grinder(series))
    assert found.frame_numbers == (1, 2, 3, 1, 2, 1, 2)
    again = volume_grinder(kind([*one, one[1]]))
    same(again, found)


@pytest.mark.parametrize("total", [True, False])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_g56_a_part_that_is_missing_is_told(kind: Callable, missing: int, total: bool) -> None:
    one = parts(made(), [3, 2, 2])
    if not total:
        for part in one:
            del part.InConcatenationTotalNumber
    del one[missing]
    if missing == 2 and not total:
        # Nothing tells that there was more.
        assert volume_grinder(kind(one)).shape == (5, 9, 11)
        return
    with pytest.raises(
        InconsistentSeries, match=f"InConcatenationNumber {missing + 1} is missing"
    ) as told:
        volume_grinder(kind(one))
    assert one[0].SOPInstanceUID in str(told.value)


def test_g43_g56_a_concatenation_is_split_wherever_it_was_cut(kind: Callable) -> None:
    series = made()
    second = distinct([copy.deepcopy(one) for one in series], seed=5)
    for one in second:
        one.SOPInstanceUID = generate_uid()
    cut = parts([*series, *second], [6, 4, 4])
    times = [2.5] * 7 + [5.0] * 7
    for part in cut:
        for group in part.PerFrameFunctionalGroupsSequence:
            group.MREchoSequence = [item(EffectiveEchoTime=times.pop(0))]
    for found in (
        series_grinder(kind(cut), split_by="EffectiveEchoTime"), series_grinder(kind(cut))
    ):  # fmt: skip
        assert list(found) == [2.5, 5.0]
        same(found[2.5], volume_grinder(series))
        same(found[5.0], volume_grinder(second))
    with pytest.raises(InconsistentSeries, match="InConcatenationNumber 2 is missing"):
        series_grinder(kind([cut[0], cut[2]]), split_by="EffectiveEchoTime")


def test_g56_parts_that_contradict_each_other_are_told(kind: Callable) -> None:
    one = parts(made(), [3, 2, 2])
    one[1].ConcatenationFrameOffsetNumber = 4
    with pytest.raises(InconsistentSeries, match="OffsetNumber 4") as told:
        volume_grinder(kind(one))
    assert one[1].SOPInstanceUID in str(told.value)
    one[1].InConcatenationNumber = 1
    with pytest.raises(InconsistentSeries, match="InConcatenationNumber"):
        volume_grinder(kind(one))


# Indices of frames


def indexed(series: list[Dataset], pointers: list[int], indices: list[list[int]]) -> Dataset:
    one = enhanced(series)
    one.DimensionIndexSequence = Sequence(
        [item(DimensionIndexPointer=pointer) for pointer in pointers]
    )
    for group, values in zip(one.PerFrameFunctionalGroupsSequence, indices, strict=True):
        del group.FrameContentSequence[0].InStackPositionNumber
        group.FrameContentSequence[0].DimensionIndexValues = values
    return one


POSITION, STACK, IN_STACK = 0x00200032, 0x00209056, 0x00209057


@pytest.mark.parametrize("pointer", [POSITION, IN_STACK])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("descending", [False, True])
def test_g52_g53_the_index_of_the_position_is_looked_up(
    kind: Callable, pointer: int, place: int, descending: bool
) -> None:
    series = made()
    pointers = [STACK, 0x00209128]
    pointers.insert(place, pointer)
    indices = [[1, 5 - k % 2] for k in range(7)]
    for k, values in enumerate(indices):
        values.insert(place, 7 - k if descending else k + 1)
    found = volume_grinder(kind([indexed(series, pointers, indices)]))
    same(found, volume_grinder(series))
    assert found.warnings == ()
    indices[2][place], indices[3][place] = indices[3][place], indices[2][place]
    found = volume_grinder(kind([indexed(series, pointers, indices)]))
    same(found, volume_grinder(series))
    assert "frame 3" in found.warnings[0]
    assert "frame 4" in found.warnings[0]
    assert "the positions count" in found.warnings[0]


def test_g52_in_stack_positions_are_checked_where_there_are_no_dimensions(kind: Callable) -> None:
    one = enhanced(made())
    assert volume_grinder(kind([one])).warnings == ()
    one.PerFrameFunctionalGroupsSequence[4].FrameContentSequence[0].InStackPositionNumber = 1
    assert "dimension indices" in volume_grinder(kind([one])).warnings[0]


# Others


def test_g57_legacy_converted_objects_are_read_as_enhanced_ones(kind: Callable) -> None:
    series = made()
    one = enhanced(series)
    for uid in ("1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.4.4",
                "1.2.840.10008.5.1.4.1.1.128.1"):  # fmt: skip
        one.SOPClassUID = uid
        same(volume_grinder(kind([one])), volume_grinder(series))


def test_g64_whole_slides_are_refused(kind: Callable) -> None:
    one = enhanced(made())
    one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    for grinder in (volume_grinder, series_grinder):
        with pytest.raises(UnsupportedImage, match="whole slide") as told:
            grinder(kind([one]))
        assert one.SOPInstanceUID in str(told.value)


def segmentation(segments: list[list[int]], slices: list[Dataset]) -> Dataset:
    """8 bit masks: each frame one slice of one segment; slices without it have no frame."""
    order = [(number, k) for number, places in enumerate(segments) for k in places]
    one = enhanced([slices[k] for _, k in order])
    one.SOPClassUID, one.Modality = "1.2.840.10008.5.1.4.1.1.66.4", "SEG"
    for group, (number, _) in zip(one.PerFrameFunctionalGroupsSequence, order, strict=True):
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number + 1)]
        del group.FrameContentSequence[0].StackID
        del group.PixelValueTransformationSequence
    return one


def test_g62_segments_are_volumes_and_their_gaps_are_filled(kind: Callable) -> None:
    slices = distinct(make_series(8, 5, 7))
    one = segmentation([[0, 1, 2, 5, 6], [3, 4, 5]], slices)
    with pytest.raises(InconsistentSeries, match="ReferencedSegmentNumber") as told:
        volume_grinder(kind([one]))
    assert one.SOPInstanceUID in str(told.value)
    found: dict[Any, Volume] = series_grinder(
        kind([one]), split_by="ReferencedSegmentNumber", gaps="fill", incomplete="keep"
    )
    assert list(found) == [1, 2]
    assert [volume.shape[0] for volume in found.values()] == [7, 3]
    assert numpy.isnan(found[1].array[3:5]).all()
    stored = [numpy.frombuffer(single.PixelData, "<u2")[:35].reshape(5, 7) for single in slices]
    for volume, index in ((found[1], [0, 1, 2, 5, 6]), (found[2], [3, 4, 5])):
        numpy.testing.assert_array_equal(
            volume.array[[k - index[0] for k in index]], [stored[k] for k in index]
        )


@pytest.mark.parametrize("sparse", [True, False])
def test_g62_segments_that_highdicom_wrote_lie_in_its_source(sparse: bool) -> None:
    hd = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    series = make_series(7, 9, 11, orientation=OBLIQUE)
    source = [pydicom.dcmread(io.BytesIO(encode(one)[0])) for one in series]
    mask = numpy.zeros((7, 9, 11), numpy.uint8)
    mask[1:3, 2:5, 3:6], mask[5, 2:5, 3:6], mask[2:5, 6:8, 3:9] = 1, 1, 2
    described = [
        hd.seg.SegmentDescription(
            number, str(number), codes.cid7150.Tissue, codes.cid7150.Tissue,
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in (1, 2)
    ]  # fmt: skip
    written = hd.seg.Segmentation(
        source, mask, hd.seg.SegmentationTypeValues.BINARY, described, hd.UID(), 1, hd.UID(), 1,
        "m", "mm", "1", "1", omit_empty_frames=sparse,
    )  # fmt: skip
    file = io.BytesIO()
    written.save_as(file)
    given = [LazyDataset(file.getvalue())]
    with pytest.raises(InconsistentSeries, match="ReferencedSegmentNumber"):
        volume_grinder(given)
    found = series_grinder(
        given, split_by="ReferencedSegmentNumber", gaps="fill", incomplete="keep"
    )
    assert list(found) == [1, 2]
    to_index = numpy.linalg.inv(volume_grinder(source).affine)
    for number, volume in found.items():
        start = round(float((to_index @ volume.affine)[2, 3]))
        there = numpy.nan_to_num(volume.array)
        expected = mask == number
        numpy.testing.assert_array_equal(there, expected[start : start + len(there)])
        assert there.sum() == expected.sum()


def test_g51_g52_highdicom_reads_the_same_volume_of_shuffled_frames() -> None:
    hd = pytest.importorskip("highdicom")
    one = enhanced(make_series(7, 9, 11, orientation=OBLIQUE), [3, 0, 6, 1, 5, 2, 4])
    volume = volume_grinder([one])
    read = hd.Image.from_dataset(pydicom.dcmread(io.BytesIO(encode(one)[0])))
    other = read.get_volume(apply_real_world_transform=False)
    # Its index is (slice, row, column), and its slices go against the normal.
    numpy.testing.assert_array_equal(other.array[::-1], volume.array)
    for k, row, column in ((0, 0, 0), (6, 8, 10), (2, 3, 5)):
        numpy.testing.assert_allclose(
            other.affine @ (6 - k, row, column, 1), volume.affine @ (column, row, k, 1), atol=1e-6
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"SliceNormalVector": ["1", "0"]},
        {"NumberOfImagesInMosaic": ["9" * 400]},
    ],
)
def test_g58_a_csa_header_of_odd_values_is_an_error_of_ours(fields: dict[str, list[str]]) -> None:
    one = mosaic(make_series(6, 8, 8))
    whole = {
        "NumberOfImagesInMosaic": ["6"],
        "SliceNormalVector": ["0", "0", "1"],
        **fields,
    }
    one[0x00291010].value = csa(whole)
    with pytest.raises(DicomnodeError) as told:
        volume_grinder([one])
    assert one.SOPInstanceUID in str(told.value)


def test_g59_a_detector_of_odd_values_is_an_error_of_ours() -> None:
    for keyword, value in (
        ("ImagePositionPatient", [1, 2]),
        ("ImageOrientationPatient", [1, 0, 0]),
    ):
        one = reconstruction(make_series(4, 6, 6), "2.5")
        setattr(one.DetectorInformationSequence[0], keyword, value)
        with pytest.raises(DicomnodeError) as told:
            volume_grinder([one])
        assert one.SOPInstanceUID in str(told.value)
