"""What the policies do with images that are not one plain stack, beside slow, obvious versions."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydicom.dataset import Dataset
from tests.unit.test_volume import distinct, slow_values

from dicomnode.errors import InconsistentSeries, IncorrectlyConfigured
from dicomnode.lib.dicom import LazyDataset, encode, load
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.testing import make_series


def at(heights: list[float], shift: float = 0.0) -> list[Dataset]:
    """Axial slices at these heights in mm; each goes sideways by `shift` mm for each mm upwards."""
    made = distinct(make_series(len(heights), 5, 7))
    for one, height in zip(made, heights, strict=True):
        one.ImagePositionPatient = [10, f"{height * shift:.6f}", f"{height:.6f}"]
    return made


def shuffled(made: list[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in made[::2] + made[1::2]]


def values(made: list[Dataset]) -> list[numpy.ndarray]:
    return [slow_values(one).astype("f4") for one in made]


# Gaps


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_g29_g31_missing_slices_are_nan_at_their_place(shift: float) -> None:
    made = at([0, 2, 4, 8, 10, 16], shift)
    volume = volume_grinder(gaps="fill")(shuffled(made))
    index = [0, 1, 2, 4, 5, 8]
    assert volume.shape == (9, 5, 7)
    for k, expected in zip(index, values(made), strict=True):
        numpy.testing.assert_array_equal(volume.array[k], expected)
    for k in {*range(9)} - {*index}:
        assert numpy.isnan(volume.array[k]).all()
        assert (volume.sop_instance_uids[k], volume.frame_numbers[k]) == ("", 0)
    assert [volume.sop_instance_uids[k] for k in index] == [one.SOPInstanceUID for one in made]
    numpy.testing.assert_allclose(volume.affine[:3, 2], [0, 2 * shift, 2])
    for k in range(9):
        numpy.testing.assert_allclose(volume.positions_mm[k], [10, 2 * k * shift, 2 * k])
        numpy.testing.assert_allclose((volume.affine @ (0, 0, k, 1))[:3], volume.positions_mm[k])
    assert "3 of 9 slices are NaN" in volume.warnings[0]
    assert made[2].SOPInstanceUID in volume.warnings[0]
    numpy.testing.assert_array_equal(
        numpy_grinder(gaps="fill", dtype="f8")(shuffled(made)), volume.array
    )


def test_g31_filling_needs_whole_multiples_of_the_smallest_distance() -> None:
    made = at([0, 2, 4, 9, 11])
    with pytest.raises(InconsistentSeries, match="no whole multiples") as told:
        volume_grinder(gaps="fill")(made)
    assert made[2].SOPInstanceUID in str(told.value)
    assert made[3].SOPInstanceUID in str(told.value)
    # Distances of 4 and 6 mm are multiples of what the header says.
    made = at([0, 4, 10])
    for one in made:
        one.SpacingBetweenSlices = "2"
    assert volume_grinder(gaps="fill")(made).shape == (6, 5, 7)


def test_g31_slices_that_are_nearly_at_one_place_do_not_fill_the_memory() -> None:
    made = at([0, 0.01, 500])
    for gaps in ("fill", "resample"):
        with pytest.raises(InconsistentSeries, match="16 slices for each image"):
            volume_grinder(gaps=gaps)(made)


@pytest.mark.parametrize("shift", [0.0, -0.25])
def test_g29_g31_slices_are_resampled_linearly_between_their_neighbours(shift: float) -> None:
    heights = [0, 1, 2, 5, 8, 11]
    made = at(heights, shift)
    volume = volume_grinder(gaps="resample", dtype="f8")(shuffled(made))
    stack = numpy.array([slow_values(one) for one in made])
    assert volume.shape == (12, 5, 7)
    for k in range(12):
        for row in range(5):
            expected = [numpy.interp(k, heights, stack[:, row, column]) for column in range(7)]
            numpy.testing.assert_allclose(volume.array[k, row], expected, rtol=1e-12)
        is_there = k in heights
        assert bool(volume.sop_instance_uids[k]) == is_there
        if is_there:
            assert volume.sop_instance_uids[k] == made[heights.index(k)].SOPInstanceUID
    numpy.testing.assert_allclose(volume.affine[:3, 2], [0, shift, 1], atol=1e-9)
    assert "6 of 12 slices were interpolated" in volume.warnings[0]


def test_g31_resampling_keeps_both_ends() -> None:
    made = at([0, 1, 2.5, 4.3])
    volume = volume_grinder(gaps="resample")(made)
    assert volume.shape == (5, 5, 7)
    assert volume.spacing_mm[0] == pytest.approx(4.3 / 4)
    numpy.testing.assert_array_equal(volume.array[[0, -1]], numpy.array(values(made))[[0, -1]])


def test_g31_resampling_to_as_many_slices_as_there_are_interpolates_too() -> None:
    heights = [0, 1, 2.02, 3.06]
    made = at(heights)
    volume = volume_grinder(gaps="resample", dtype="f8")(made)
    stack = numpy.array([slow_values(one) for one in made])
    assert volume.shape == stack.shape
    for k in range(4):
        expected = numpy.interp(k * 1.02, heights, stack[:, 2, 3])
        assert volume.array[k, 2, 3] == pytest.approx(expected)
    assert [bool(uid) for uid in volume.sop_instance_uids] == [True, False, False, True]


def test_g31_g34_slices_kept_as_they_are_have_places_and_no_step() -> None:
    made = at([0, 2, 4, 9, 11])
    made[3].ImagePositionPatient[0] = 14
    volume = volume_grinder(gaps="keep")(shuffled(made))
    numpy.testing.assert_array_equal(volume.array, values(made))
    assert numpy.isnan(volume.affine[:3, 2]).all()
    assert math.isnan(volume.spacing_mm[0])
    numpy.testing.assert_allclose(
        volume.positions_mm, [[10, 0, 0], [10, 0, 2], [10, 0, 4], [14, 0, 9], [10, 0, 11]]
    )
    assert made[2].SOPInstanceUID in volume.warnings[0]


@pytest.mark.parametrize("gaps", ["fill", "resample"])
def test_g34_slices_that_drift_are_neither_filled_nor_resampled(gaps: Any) -> None:
    made = at([0, 2, 4, 8, 10])
    made[2].ImagePositionPatient[0] = 13
    with pytest.raises(InconsistentSeries, match="off the straight line") as told:
        volume_grinder(gaps=gaps)(made)
    assert made[2].SOPInstanceUID in str(told.value)


@pytest.mark.parametrize("gaps", ["error", "fill", "resample", "keep"])
def test_a_regular_stack_is_the_same_under_every_policy(gaps: Any) -> None:
    made = at([0, 2, 4, 6], 0.1)
    volume = volume_grinder(gaps=gaps)(shuffled(made))
    numpy.testing.assert_array_equal(volume.array, values(made))
    numpy.testing.assert_allclose(volume.affine[:3, 2], [0, 0.2, 2])
    assert volume.warnings == ()


def test_g30_the_extent_is_recorded_in_the_positions() -> None:
    made = at([0, 2, 4, 6])
    numpy.testing.assert_allclose(
        volume_grinder(made[1:]).positions_mm, [[10, 0, 2], [10, 0, 4], [10, 0, 6]]
    )


@pytest.mark.parametrize("option", [{"gaps": "fill"}, {"gaps": "resample"}, {"tilt": "resample"}])
def test_nan_needs_a_float_dtype_and_says_so_at_once(option: dict[str, Any]) -> None:
    for grinder in (numpy_grinder, volume_grinder):
        with pytest.raises(IncorrectlyConfigured, match="float dtype"):
            grinder(dtype="i2", **option)
        with pytest.raises(IncorrectlyConfigured, match="float dtype"):
            grinder(out=numpy.empty((2, 5, 7), "i4"), **option)


@pytest.mark.parametrize("name", ["gaps", "duplicates", "localizers", "tilt"])
def test_an_unknown_policy_is_told_at_once(name: str) -> None:
    with pytest.raises(IncorrectlyConfigured, match=name):
        volume_grinder(**{name: "average"})


def test_out_is_filled_where_it_has_the_shape_of_the_result() -> None:
    made = at([0, 2, 6])
    out = numpy.empty((4, 5, 7), "f4")
    volume = volume_grinder(gaps="fill", out=out)(made)
    assert volume.array is out
    numpy.testing.assert_array_equal(out[3], values(made)[2])
    with pytest.raises(IncorrectlyConfigured, match="shape"):
        volume_grinder(gaps="fill", out=numpy.empty((3, 5, 7), "f4"))(made)


# Localizers


def test_g3_localizers_are_left_out_where_the_input_asks_for_it() -> None:
    made = at([0, 2, 4, 6])
    (scout,) = distinct(make_series(1, 9, 11, orientation=(1, 0, 0, 0, 0, -1)))
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.SeriesInstanceUID = made[0].SeriesInstanceUID
    scout.FrameOfReferenceUID = made[0].FrameOfReferenceUID
    given = [*made[:2], scout, *made[2:]]
    volume = volume_grinder(localizers="drop")(given)
    numpy.testing.assert_array_equal(volume.array, values(made))
    assert scout.SOPInstanceUID in volume.warnings[0]
    with pytest.raises(InconsistentSeries) as told:
        volume_grinder(given)
    assert scout.SOPInstanceUID in str(told.value)
    scout.Rows, scout.Columns = 5, 7
    with pytest.raises(InconsistentSeries, match='localizers="drop"'):
        volume_grinder(given)
    with pytest.raises(InconsistentSeries, match="all images are localizers"):
        volume_grinder(localizers="drop")([scout])


# Tilt


def test_g32_a_tilted_stack_is_refused_where_the_axes_are_to_be_perpendicular() -> None:
    made = at([0, 2, 4, 6], 0.25)
    with pytest.raises(InconsistentSeries, match=r"14\.0 degrees") as told:
        volume_grinder(tilt="error")(made)
    assert made[0].SOPInstanceUID in str(told.value)
    straight = at([0, 2, 4, 6])
    assert volume_grinder(tilt="error")(straight).shape == (4, 5, 7)


@pytest.mark.parametrize("sign", [1, -1])
def test_g32_a_tilted_stack_is_resampled_onto_a_straight_grid(sign: int) -> None:
    made = at([0, 2, 4, 6], 0.13 * sign)
    for one in made:
        one.ImagePositionPatient[0] = 10 + float(one.ImagePositionPatient[2]) * 0.21
    sheared = volume_grinder(dtype="f8")(made)
    volume = volume_grinder(dtype="f8", tilt="resample")(made)
    numpy.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 2], atol=1e-12)
    back = numpy.linalg.inv(sheared.affine) @ volume.affine
    checked = 0
    for k, row, column in numpy.ndindex(volume.shape):
        i, j, slice_ = (back @ (column, row, k, 1))[:3]
        assert slice_ == pytest.approx(k)
        inside = -1e-9 <= i <= 6 + 1e-9 and -1e-9 <= j <= 4 + 1e-9
        found = volume.array[k, row, column]
        assert numpy.isnan(found) != inside
        if inside:
            i0, j0 = min(max(int(i + 1e-9), 0), 5), min(max(int(j + 1e-9), 0), 3)
            a, b = i - i0, j - j0
            block = sheared.array[k, j0 : j0 + 2, i0 : i0 + 2]
            expected = numpy.array([1 - b, b]) @ block @ numpy.array([1 - a, a])
            assert found == pytest.approx(expected, rel=1e-9)
            checked += 1
    assert checked >= 4 * 4 * 6 - 4 * 10
    numpy.testing.assert_allclose((volume.affine @ (0, 0, 3, 1))[:3], volume.positions_mm[3])


def test_g32_a_stack_that_is_tilted_too_far_does_not_fill_the_memory() -> None:
    made = at([0, 2, 4, 6], 1e6)
    assert volume_grinder(made).shape == (4, 5, 7)
    with pytest.raises(InconsistentSeries, match="16 times their pixels") as told:
        volume_grinder(tilt="resample")(made)
    assert made[0].SOPInstanceUID in str(told.value) and "rows" in str(told.value)


def test_g32_real_tilted_ct_is_resampled_as_simpleitk_does_it(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    given = load(real_data / "ct-tilt-54")
    sheared = volume_grinder(given)
    volume = volume_grinder(given, tilt="resample")
    axes = volume.affine[:3, :3] / numpy.linalg.norm(volume.affine[:3, :3], axis=0)
    numpy.testing.assert_allclose(axes.T @ axes, numpy.eye(3), atol=1e-6)
    # In voxels: where a voxel of the straight grid lies in the sheared one.
    back = numpy.linalg.inv(sheared.affine) @ volume.affine
    transform = sitk.AffineTransform(back[:3, :3].ravel().tolist(), back[:3, 3].tolist())
    source = sitk.GetImageFromArray(sheared.array)
    reference = sitk.Image(*[int(size) for size in volume.shape[::-1]], sitk.sitkFloat32)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(source, reference, transform, sitk.sitkLinear, -9999.0)
    )
    both = ~numpy.isnan(volume.array) & (expected != -9999.0)
    # A row or a column at the rim is inside for one and outside for the other.
    assert both.sum() > 0.98 * sheared.array.size
    off = numpy.abs(volume.array - expected)[both]
    assert off.max() < 30
    assert numpy.percentile(off, 99.9) < 1
    assert volume.shape[1] > sheared.shape[1]


def test_g32_a_straight_ct_is_not_resampled(ct_folder: Path) -> None:
    given = load(ct_folder)
    volume = volume_grinder(given, tilt="resample")
    numpy.testing.assert_array_equal(volume.array, volume_grinder(given).array)


def test_g29_g32_gaps_and_tilt_together() -> None:
    made = at([0, 2, 6], 0.4)
    volume = volume_grinder(gaps="fill", tilt="resample")(made)
    assert numpy.isnan(volume.array[2]).all()
    assert not numpy.isnan(volume.array[3]).all()
    numpy.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 2])


def test_g14_a_quadruped_is_told() -> None:
    made = at([0, 2])
    for one in made:
        one.AnatomicalOrientationType = "QUADRUPED"
    for given in (made, shuffled(made)):
        volume = volume_grinder(given)
        assert "QUADRUPED" in volume.warnings[0]
        numpy.testing.assert_allclose(volume.affine[:3, 3], [10, 0, 0])
