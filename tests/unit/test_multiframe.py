"""Objects of several frames: the right frame at the right place, whatever order they lie in."""

import copy
import gzip
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from dicomnode.errors import DicomnodeError, InconsistentSeries, InvalidDicom, UnsupportedImage
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.lib.series import derive_series
from dicomnode.testing import make_series

OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def enhanced(
    series: list[Dataset], order: list[int] | None = None, *, defined: bool = True
) -> Dataset:
    """The slices of a series as frames of one Enhanced CT object, in the order given."""
    chosen = [series[k] for k in (order or range(len(series)))]
    first = chosen[0]
    one = copy.deepcopy(first)
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
        "RescaleSlope", "RescaleIntercept", "SliceLocation",
    ):  # fmt: skip
        if keyword in one:
            delattr(one, keyword)
    one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    one.SOPInstanceUID = generate_uid()
    one.NumberOfFrames = len(chosen)
    shared = item(
        PixelMeasuresSequence=[
            item(PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
        ],
        PlaneOrientationSequence=[item(ImageOrientationPatient=first.ImageOrientationPatient)],
        CTImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])],
    )
    frames = [
        item(
            FrameContentSequence=[item(StackID="1", InStackPositionNumber=k + 1)],
            PlanePositionSequence=[item(ImagePositionPatient=slice_.ImagePositionPatient)],
            PixelValueTransformationSequence=[
                item(
                    RescaleSlope=slice_.RescaleSlope,
                    RescaleIntercept=slice_.RescaleIntercept,
                    RescaleType="HU",
                )
            ],
        )
        for k, slice_ in enumerate(chosen)
    ]
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    one.PerFrameFunctionalGroupsSequence = Sequence(frames)
    if not defined:
        for element in one.iterall():
            if element.VR == "SQ":
                element.is_undefined_length = True
                for one_item in element.value:
                    one_item.is_undefined_length_sequence_item = True
    one.PixelData = b"".join(slice_.PixelData for slice_ in chosen)
    return one


def same(found: Any, expected: Any) -> None:
    numpy.testing.assert_array_equal(found.array, expected.array)
    numpy.testing.assert_allclose(found.affine, expected.affine, atol=1e-9)
    numpy.testing.assert_allclose(found.spacing_mm, expected.spacing_mm, rtol=1e-12)


def made(slices: int = 7) -> list[Dataset]:
    series = make_series(slices, 9, 11, orientation=OBLIQUE)
    for k, one in enumerate(series):
        one.RescaleSlope, one.RescaleIntercept = str(1 + k / 4), str(-1000 - k)
    return series


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("defined", [True, False])
@pytest.mark.parametrize("kind", ["plain", "bytes", "file"])
def test_g51_g52_g54_frames_in_any_order_are_the_volume_of_their_slices(
    kind: str, defined: bool, syntax: str, tmp_path: Path
) -> None:
    series = made()
    one = enhanced(series, [3, 0, 6, 1, 5, 2, 4], defined=defined)
    one.file_meta.TransferSyntaxUID = syntax
    given: list[Dataset] = [one]
    if kind == "bytes":
        given = [LazyDataset(encode(one)[0])]
    elif kind == "file":
        (tmp_path / "one.dcm").write_bytes(encode(one)[0])
        given = load(tmp_path)
    found = volume_grinder(given)
    same(found, volume_grinder(series))
    assert found.frame_numbers == (2, 4, 6, 1, 7, 5, 3)
    assert set(found.sop_instance_uids) == {one.SOPInstanceUID}
    # As they lie in the file.
    array = numpy_grinder(order="given", values="stored", dtype="u2")(given)
    assert array.tobytes() == one.PixelData


def test_many_frames_whose_groups_are_longer_than_any_window(tmp_path: Path) -> None:
    series = make_series(400, 4, 5)
    one = enhanced(series, list(range(400))[::-1], defined=False)
    (tmp_path / "one.dcm").write_bytes(encode(one)[0])
    same(volume_grinder(load(tmp_path)), volume_grinder(series))


def test_g51_what_a_frame_says_counts_more_than_what_is_shared() -> None:
    series = made()
    one = enhanced(series)
    shared = one.SharedFunctionalGroupsSequence[0]
    shared.PlanePositionSequence = [item(ImagePositionPatient=[1, 2, 3])]
    shared.PixelValueTransformationSequence = [item(RescaleSlope="9", RescaleIntercept="9")]
    one.RescaleSlope, one.RescaleIntercept = "7", "7"
    one.ImagePositionPatient = [4, 5, 6]
    same(volume_grinder([LazyDataset(encode(one)[0])]), volume_grinder(series))


@pytest.mark.parametrize("fragments", [1, 3])
def test_p19_frames_that_are_compressed(fragments: int) -> None:
    from tests.unit.test_codecs import RLE, rle

    series = made()
    one = enhanced(series, [3, 0, 6, 1, 5, 2, 4])
    cells = numpy.frombuffer(one.PixelData, "<u2").reshape(7, 9, 11)
    one.PixelData = encapsulate([rle(cell) for cell in cells], fragments_per_frame=fragments)
    one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
    one.file_meta.TransferSyntaxUID = RLE
    same(volume_grinder([LazyDataset(encode(one)[0])]), volume_grinder(series))


def test_several_objects_make_one_volume() -> None:
    series = made()
    parts = [enhanced(series, [0, 2, 4, 6]), enhanced(series, [5, 3, 1])]
    same(volume_grinder([LazyDataset(encode(one)[0]) for one in parts]), volume_grinder(series))


@pytest.mark.parametrize("count", [6, 8, 1, 1_000_000_000])
def test_g55_another_number_of_frames_than_there_are_is_an_error(count: int) -> None:
    one = enhanced(made())
    one.NumberOfFrames = count
    with pytest.raises(InvalidDicom, match=one.SOPInstanceUID):
        volume_grinder([LazyDataset(encode(one)[0])])


def test_g48_stacks_are_not_mixed() -> None:
    one = enhanced(made())
    one.PerFrameFunctionalGroupsSequence[2].FrameContentSequence[0].StackID = "2"
    with pytest.raises(InconsistentSeries, match=r"frame 3.*StackID"):
        volume_grinder([LazyDataset(encode(one)[0])])


def test_g42_time_points_are_not_mixed() -> None:
    series = made()
    one = enhanced(series, [0, 1, 2, 3, 0, 1, 2, 3])
    frame = len(one.PixelData) // 8
    one.PixelData = one.PixelData[:-frame] + bytes(frame)
    with pytest.raises(InconsistentSeries, match="same position"):
        volume_grinder([LazyDataset(encode(one)[0])])


def test_g29_a_missing_frame_is_an_error() -> None:
    one = enhanced(made(), [0, 1, 2, 4, 5, 6])
    with pytest.raises(InconsistentSeries, match=r"frame 3\) and .*frame 4\)"):
        volume_grinder([LazyDataset(encode(one)[0])])


def test_g61_frames_without_a_place_are_an_array_in_their_order_and_no_volume() -> None:
    (one,) = make_series(1, 9, 11)
    pixels = numpy.random.default_rng(1).integers(0, 4096, (5, 9, 11)).astype("<u2")
    one.NumberOfFrames, one.PixelData = 5, pixels.tobytes()
    for given in ([one], [LazyDataset(encode(one)[0])]):
        found = numpy_grinder(order="given", values="stored", dtype="u2")(given)
        numpy.testing.assert_array_equal(found, pixels)
        with pytest.raises(InconsistentSeries, match="no ImagePositionPatient"):
            volume_grinder(given)


@pytest.mark.parametrize("relative", [True, False])
def test_g60_the_frames_of_a_dose_lie_where_its_offsets_say(relative: bool) -> None:
    series = make_series(5, 9, 11)
    (one,) = make_series(1, 9, 11)
    del one.RescaleSlope, one.RescaleIntercept
    heights = [float(slice_.ImagePositionPatient[2]) for slice_ in series]
    one.NumberOfFrames = 5
    one.PixelData = b"".join(slice_.PixelData for slice_ in series)
    one.GridFrameOffsetVector = [height - (heights[0] if relative else 0) for height in heights]
    one.DoseGridScaling = "0.25"
    found = volume_grinder([LazyDataset(encode(one)[0])])
    expected = volume_grinder(values="stored")(series)
    numpy.testing.assert_array_equal(found.array, expected.array * 0.25)
    numpy.testing.assert_allclose(found.affine, expected.affine)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, at: data[: at + 40] + b"\xff\xff\xff\x7f" + data[at + 44 :],
        lambda data, at: data[: at + 12] + b"\x08\x00\x05\x00" + data[at + 16 :],
        lambda data, at: data[: at + 20] + bytes(60) + data[at + 80 :],
    ],
)
def test_p26_damaged_groups_are_an_error_or_an_image_elsewhere_but_never_a_crash(
    damage: Callable[[bytes, int], bytes],
) -> None:
    data = encode(enhanced(made()))[0]
    at = data.index(b"\x00\x52\x30\x92SQ")
    with pytest.raises(DicomnodeError):
        volume_grinder([LazyDataset(damage(data, at))])


def test_frames_of_pydicoms_own_files_are_what_pydicom_decodes() -> None:
    checked = 0
    folder = Path(str(pydicom.__file__)).parent / "data" / "test_files"
    for path in sorted(folder.glob("*.dcm")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            frames = dataset.get("NumberOfFrames") or 1
            grey = dataset.get("SamplesPerPixel", 1) == 1
            if frames == 1 or not grey or dataset.get("BitsAllocated") == 1:
                continue
            if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
                continue
            try:
                expected = dataset.pixel_array
            except (AttributeError, RuntimeError, ValueError, NotImplementedError):
                continue
            found = numpy_grinder(order="given", values="stored", dtype="f8")([*load(path)])
            numpy.testing.assert_array_equal(found, expected, path.name)
            checked += 1
    assert checked >= 3


def test_g51_a_real_enhanced_mr_is_what_dcm2niix_reads(
    peer: Callable[[str], str], tmp_path: Path
) -> None:
    nibabel = pytest.importorskip("nibabel")
    packed = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / "philips_mprage.dcm.gz"
    data = gzip.decompress(packed.read_bytes())
    volume = volume_grinder([LazyDataset(data)])
    (tmp_path / "one.dcm").write_bytes(data)
    subprocess.run(
        [peer("dcm2niix"), "-b", "n", "-f", "out", "-o", tmp_path, tmp_path],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.nii")
    image = nibabel.load(path)
    assert sorted(image.shape) == sorted(volume.shape)
    # To the voxels of the other reader, whatever way it turned them.
    back = numpy.linalg.inv(image.affine) @ numpy.diag([-1, -1, 1, 1]) @ volume.affine
    values = image.get_fdata()
    k, row, column = numpy.indices(volume.shape)[:, ::7, ::5, ::5].reshape(3, -1)
    places = (back @ numpy.stack([column, row, k, numpy.ones_like(k)]))[:3]
    index = numpy.rint(places).astype(int)
    numpy.testing.assert_allclose(places, index, atol=0.02)
    numpy.testing.assert_allclose(values[tuple(index)], volume.array[k, row, column], rtol=1e-4)
    assert volume.affine[:3, :3].any()


MR_CLASSES = ("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("sop_class", "expected"),
    [
        ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2"),
        ("1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.2"),
        *((one, "1.2.840.10008.5.1.4.1.1.4") for one in MR_CLASSES),
    ],
)
def test_w1_g51_frames_give_a_classic_series_with_the_geometry_of_each(
    sop_class: str, expected: str, lazy: bool, peer: Callable[[str], str], tmp_path: Path
) -> None:
    one = enhanced(make_series(7, 9, 11, orientation=OBLIQUE), [3, 0, 6, 1, 5, 2, 4])
    one.SOPClassUID, one.Modality = sop_class, "MR" if sop_class in MR_CLASSES else "CT"
    for k, group in enumerate(one.PerFrameFunctionalGroupsSequence):
        group.MREchoSequence = [item(EffectiveEchoTime=2.5 + k)]
        group.CTXRayDetailsSequence = [item(KVP="80")]
    del one.KVP
    given = [LazyDataset(encode(one)[0])] if lazy else [one]
    volume = volume_grinder(given)
    results = list(derive_series(volume.array + 1, given))
    back = volume_grinder([LazyDataset(encode(result)[0]) for result in results])
    numpy.testing.assert_array_equal(back.array, volume.array + 1)
    numpy.testing.assert_allclose(back.affine, volume.affine, atol=1e-6)
    assert {result.SOPClassUID for result in results} == {expected}
    for k, result in enumerate(results):
        (reference,) = result.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == one.SOPInstanceUID
        assert reference.ReferencedFrameNumber == volume.frame_numbers[k]
        assert "PerFrameFunctionalGroupsSequence" not in result
        assert "NumberOfFrames" not in result
        assert result.SliceThickness == 2.5
        if sop_class in MR_CLASSES:
            assert result.EchoTime == 1.5 + volume.frame_numbers[k]
        else:
            assert result.KVP == 80
    for k, result in enumerate(results):
        path = tmp_path / f"{k}.dcm"
        path.write_bytes(encode(result)[0])
        told = subprocess.run(
            [peer("dciodvfy"), path], capture_output=True, text=True, check=False
        ).stderr
        assert not [line for line in told.splitlines() if line.startswith("Error")], told


def test_a_series_is_not_derived_from_other_frames() -> None:
    one = enhanced(made())
    one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.130"
    with pytest.raises(UnsupportedImage, match="Enhanced PET") as told:
        list(derive_series(volume_grinder([one]).array, [one]))
    assert one.SOPInstanceUID in str(told.value)


def test_a_sequence_that_was_changed_inside_counts() -> None:
    """As it does for a dataset that pydicom read."""
    series = made()
    one = LazyDataset(encode(enhanced(series))[0])
    groups = one.PerFrameFunctionalGroupsSequence
    untouched = volume_grinder([one])
    numpy.testing.assert_array_equal(untouched.array, volume_grinder(series).array)
    for item in groups:
        x, y, z = item.PlanePositionSequence[0].ImagePositionPatient
        item.PlanePositionSequence[0].ImagePositionPatient = [x, y, float(z) + 7]
    moved = volume_grinder([one])
    numpy.testing.assert_allclose(moved.affine[2, 3], untouched.affine[2, 3] + 7)
    one.SharedFunctionalGroupsSequence = []
    with pytest.raises(DicomnodeError):
        volume_grinder([one])


def test_g60_offsets_of_neither_form_are_an_error() -> None:
    (one,) = make_series(1, 9, 11)
    one.NumberOfFrames, one.PixelData = 3, one.PixelData * 3
    first = float(one.ImagePositionPatient[2]) + 5
    one.GridFrameOffsetVector = [first, first + 1, first + 2]
    with pytest.raises(InvalidDicom, match="3004,000C"):
        volume_grinder([one])
