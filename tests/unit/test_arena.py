"""Images that are decoded one by one give what they give when they are read together, or nothing."""

import copy
import pickle
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import imagecodecs
import numpy
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import generate_uid

from dicomnode.errors import DicomnodeError, InconsistentSeries
from dicomnode.lib import arena as module
from dicomnode.lib.arena import Arena, Frame
from dicomnode.lib.dicom import LazyDataset, encode
from dicomnode.lib.grinders import numpy_grinder, volume_grinder
from dicomnode.lib.images import Reading
from dicomnode.lib.volume import Volume
from dicomnode.testing import make_series

from .test_multiframe import OBLIQUE, enhanced

MANY = 10**6
JPEG_LS, J2K = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"


def compressed(series: Sequence[Dataset], syntax: str) -> list[Dataset]:
    """A series with pixels that JPEG-LS or JPEG 2000 can give back."""
    made = []
    for one in copy.deepcopy(list(series)):
        cells = numpy.frombuffer(one.PixelData, "<u2").reshape(one.Rows, one.Columns)
        code = (
            imagecodecs.jpegls_encode(cells)
            if syntax == JPEG_LS
            else imagecodecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="j2k")
        )
        one.PixelData = encapsulate([bytes(code)])
        one["PixelData"].VR = "OB"
        one["PixelData"].is_undefined_length = True
        one.file_meta.TransferSyntaxUID = syntax
        made.append(one)
    return made


def cut_off(one: Dataset) -> None:
    """Half of a codestream, in an object that is whole."""
    (frame,) = generate_frames(one.PixelData, number_of_frames=1)
    one.PixelData = encapsulate([frame[: len(frame) // 2]])
    one["PixelData"].VR = "OB"
    one["PixelData"].is_undefined_length = True


def new(
    reading: Reading | None = None, most_bytes: int = MANY, reasons: list[str] | None = None
) -> Arena:
    return Arena(reading or Reading(), most_bytes, [].append if reasons is None else reasons.append)


def arrived(datasets: Sequence[Dataset], arena: Arena, decoded: bool = True) -> list[LazyDataset]:
    """Datasets that were added to an arena in this order, each decoded at once."""
    lazy = []
    for dataset in datasets:
        source = encode(dataset)[0]
        for frame in arena.add(source):
            if decoded:
                arena.decode(frame)
        lazy.append(LazyDataset(source, decoded=arena))
    return lazy


def is_part_of_another(array: numpy.ndarray) -> bool:
    return not array.flags.owndata


def same(found: Volume, expected: Volume) -> None:
    assert found.array.dtype == expected.array.dtype
    assert found.array.tobytes() == expected.array.tobytes()
    assert found.array.shape == expected.array.shape
    assert found.array.flags.c_contiguous and found.array.flags.writeable
    for one in fields(Volume):
        value, wanted = getattr(found, one.name), getattr(expected, one.name)
        numpy.testing.assert_array_equal(value, wanted, err_msg=one.name)


def ordinary(datasets: Sequence[Dataset]) -> list[Dataset]:
    return [LazyDataset(encode(one)[0]) for one in datasets]


ORDERS = {
    "up": lambda order: order,
    "down": lambda order: order[::-1],
    "shuffled": lambda order: random.Random(3).sample(order, len(order)),
    "by name: 1, 10, 11, 2": lambda order: [order[k] for k in sorted(range(len(order)), key=str)],
    "two senders from both ends": lambda order: [
        order[k // 2] if k % 2 else order[-1 - k // 2] for k in range(len(order))
    ],
}
# The InstanceNumber of slice k of n, and in which orders the volume is then a part of the arena.
NUMBERS: dict[str, tuple[Any, set[str]]] = {
    "as the positions": (lambda k, n: k + 1, {*ORDERS}),
    "against the positions": (lambda k, n: -k, {*ORDERS}),
    "none": (lambda k, n: None, {"up", "down"}),
    "all the same": (lambda k, n: 7, set()),
    "every second": (lambda k, n: 2 * k, set()),
    "far apart": (lambda k, n: k * 10**11, set()),
    "without any sense": (lambda k, n: (k * 5 + 3) % n, set()),
}


@pytest.mark.parametrize("slices", [1, 2, 13])
@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE])
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_volume_is_that_of_the_ordinary_way_in_any_order(
    order: str, numbers: str, orientation: Any, slices: int
) -> None:
    number, views = NUMBERS[numbers]
    series = make_series(slices, 7, 9, orientation=orientation)
    for k, one in enumerate(series):
        one.RescaleSlope = str(1 + k / 4)
        one.InstanceNumber = number(k, slices)
    series = ORDERS[order](series)
    reasons: list[str] = []
    given = arrived(series, new(reasons=reasons))
    found = volume_grinder(given)
    same(found, volume_grinder(ordinary(series)))
    assert reasons == []
    # A part of the arena is not copied.
    assert is_part_of_another(found.array) or order not in views


@pytest.mark.parametrize("order", ["InstanceNumber", "given"])
def test_orders_that_are_not_of_the_position(order: Any) -> None:
    series = make_series(6, 4, 5)[::-1]
    grinder = numpy_grinder(order=order)
    found = grinder(arrived(series, new()))
    numpy.testing.assert_array_equal(found, grinder(ordinary(series)))


def test_images_without_a_place_go_up() -> None:
    series = make_series(4, 3, 5)
    for one in series:
        del one.ImagePositionPatient, one.InstanceNumber
    grinder = numpy_grinder(order="given")
    found = grinder(arrived(series, new()))
    assert is_part_of_another(found)
    numpy.testing.assert_array_equal(found, grinder(ordinary(series)))


@pytest.mark.parametrize("syntax", [JPEG_LS, J2K])
def test_compressed_images(syntax: str) -> None:
    series = make_series(5, 20, 17)
    given = arrived(compressed(series, syntax), new())
    found = volume_grinder(given)
    assert is_part_of_another(found.array)
    same(found, volume_grinder(ordinary(compressed(series, syntax))))
    numpy.testing.assert_array_equal(found.array, volume_grinder(series).array)


def test_warnings_are_those_of_the_ordinary_way() -> None:
    series = compressed(make_series(5, 8, 9), JPEG_LS)
    for one in series[1:4]:
        one.BitsStored, one.HighBit = 8, 7
    series.insert(2, copy.deepcopy(series[0]))
    del series[2].PixelData, series[2].Rows
    series[2].SOPInstanceUID = "1.2.3"
    series = [series[k] for k in (3, 5, 0, 2, 1, 4)]
    expected = volume_grinder(ordinary(series))
    assert len(expected.warnings) == 2 and "and 2 more" in expected.warnings[1]
    same(volume_grinder(arrived(series, new())), expected)


@pytest.mark.parametrize("order", [None, [6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]])
def test_several_frames(order: list[int] | None) -> None:
    one = enhanced(make_series(7, 5, 6), order)
    found = volume_grinder(arrived([one], new()))
    assert is_part_of_another(found.array) == (order is None or order[0] == 6)
    same(found, volume_grinder(ordinary([one])))


def test_one_option_more_is_read_in_the_ordinary_way() -> None:
    series = make_series(3, 4, 5)
    reading = Reading(numpy.dtype("i2"), "stored")
    given = arrived(series, new(reading))
    assert not is_part_of_another(numpy_grinder(given))
    assert not is_part_of_another(numpy_grinder(dtype="i2")(given))
    found = numpy_grinder(dtype="i2", values="stored")(given)
    assert is_part_of_another(found) and found.dtype == numpy.int16
    numpy.testing.assert_array_equal(found, numpy_grinder(given) + 1024)


def test_into_an_array_of_the_user() -> None:
    series = make_series(3, 4, 5)
    given = arrived(series, new())
    out = numpy.empty((3, 4, 5), numpy.float32)
    assert numpy_grinder(given, out=out) is out
    numpy.testing.assert_array_equal(out, numpy_grinder(series))


def test_a_second_look_is_another_array() -> None:
    series = make_series(4, 5, 6)
    arena = new()
    given = arrived(series, arena)
    first = numpy_grinder(given)
    assert arena.size == 0
    first[:] = -7
    second = numpy_grinder(given)
    numpy.testing.assert_array_equal(second, numpy_grinder(series))
    assert (first == -7).all() and not is_part_of_another(second)


def test_the_rest_can_be_taken_after_a_part() -> None:
    series = make_series(5, 5, 6)
    arena = new()
    given = arrived(series, arena)
    first, second = numpy_grinder(given[:2]), numpy_grinder(given[2:])
    assert is_part_of_another(first) and is_part_of_another(second) and arena.size == 0
    first[:] = -7
    numpy.testing.assert_array_equal(second, numpy_grinder(series)[2:])


def test_an_image_that_is_given_twice() -> None:
    given = arrived(make_series(2, 5, 6), new())
    grinder = numpy_grinder(order="given")
    found = grinder([given[0], given[1], given[0]])
    numpy.testing.assert_array_equal(found, grinder(ordinary(make_series(2, 5, 6)))[[0, 1, 0]])


def test_an_image_that_arrived_in_another_way_as_well() -> None:
    series = make_series(4, 5, 6)
    given = [*arrived(series[:3], new()), *ordinary(series[3:])]
    same(volume_grinder(given), volume_grinder(series))
    given = [*ordinary(series[:1]), *arrived(series[1:], new())]
    same(volume_grinder(given), volume_grinder(series))


def test_a_change_of_the_user_is_seen() -> None:
    series = make_series(4, 5, 6)
    given = arrived(series, new())
    given[2].RescaleIntercept = series[2].RescaleIntercept = "7"
    given[1].SeriesDescription = "no attribute of the image"
    same(volume_grinder(given), volume_grinder(series))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_dataset_leaves_the_arena_behind(duplicate: Any) -> None:
    given = arrived(make_series(2, 5, 6), new())
    copies = [duplicate(one) for one in given]
    assert all(one.decoded is None for one in copies)
    numpy.testing.assert_array_equal(numpy_grinder(copies), numpy_grinder(given))


def test_an_image_that_comes_twice_is_decoded_once() -> None:
    series = make_series(2, 5, 6)
    arena = new()
    given = arrived(series, arena)
    assert arena.add(given[0].source) == []
    assert is_part_of_another(numpy_grinder(given))


def damaged(series: list[Dataset]) -> None:
    if series[1].file_meta.TransferSyntaxUID == J2K:
        cut_off(series[1])
    else:
        series[1].PixelData = series[1].PixelData[:90]


def of_another_size(series: list[Dataset]) -> None:
    series[1].Rows = 3
    series[1].PixelData = series[1].PixelData[: 3 * series[1].Columns * 2]


def in_colour(series: list[Dataset]) -> None:
    series[1].SamplesPerPixel = 3
    series[1].PhotometricInterpretation = "RGB"
    series[1].PlanarConfiguration = 0
    series[1].PixelData = series[1].PixelData * 3


def with_a_position_of_two_numbers(series: list[Dataset]) -> None:
    series[1].ImagePositionPatient = [1, 2]


@pytest.mark.parametrize(
    "spoil", [damaged, of_another_size, in_colour, with_a_position_of_two_numbers]
)
@pytest.mark.parametrize("syntax", ["", J2K])
def test_what_goes_wrong_is_the_error_of_the_ordinary_way(spoil: Any, syntax: str) -> None:
    series = make_series(4, 8, 9)
    if syntax:
        series = compressed(series, syntax)
    spoil(series)
    reasons: list[str] = []
    arena = new(reasons=reasons)
    with pytest.raises(DicomnodeError) as expected:
        volume_grinder(ordinary(series))
    given = arrived(series, arena)
    with pytest.raises(type(expected.value)) as found:
        volume_grinder(given)
    assert str(found.value) == str(expected.value)
    assert arena.size == 0 and len(reasons) == 1
    assert str(series[1].SOPInstanceUID) in reasons[0]


def test_more_than_the_limit_is_read_in_the_ordinary_way() -> None:
    series = make_series(4, 5, 6)
    reasons: list[str] = []
    for most in (1, 3 * 120, 4 * 120 - 1):
        arena = new(most_bytes=most, reasons=reasons)
        given = arrived(series, arena)
        assert arena.size == 0
        same(volume_grinder(given), volume_grinder(series))
    assert [reason.split()[0] for reason in reasons] == ["1", "4", "4"]
    arena = new(most_bytes=4 * 120, reasons=reasons)
    given = arrived(series, arena)
    assert arena.size == 4 * 120
    assert is_part_of_another(volume_grinder(given).array) and len(reasons) == 3


def test_what_was_not_decoded_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    series = make_series(3, 5, 6)
    arena = new()
    lazy = arrived(series[:2], arena)
    with monkeypatch.context() as patched:
        # The image has its place, and then something that nobody thought of goes wrong.
        patched.setattr(module, "Frame", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            arena.add(encode(series[2])[0])
    lazy.append(LazyDataset(encode(series[2])[0], decoded=arena))
    same(volume_grinder(lazy), volume_grinder(series))


def test_an_image_that_nobody_decoded_is_not_taken() -> None:
    series = make_series(2, 5, 6)
    arena = new()
    sources = [encode(one)[0] for one in series]
    first, _ = (arena.add(source)[0] for source in sources)
    # As often as there are images, but not each of them.
    arena.decode(first)
    arena.decode(first)
    found = volume_grinder([LazyDataset(source, decoded=arena) for source in sources])
    assert not is_part_of_another(found.array)
    same(found, volume_grinder(series))


def test_what_was_decoded_to_another_type_is_not_taken() -> None:
    arena = new()
    (one,) = arrived(make_series(1, 5, 6), arena)
    headers = arena.headers(one.source)
    assert headers is not None
    for shape, dtype in (((5, 6), "f8"), ((5, 6, 3), "f4"), ((6, 5), "f4")):
        assert arena.take(headers, Reading(), shape, numpy.dtype(dtype)) is None
    assert arena.take(headers, Reading(), (5, 6), numpy.dtype("f4")) is not None


def test_a_decoder_that_fails_in_a_way_nobody_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    series = make_series(3, 5, 6)
    arena = new()
    lazy = arrived(series[:2], arena)
    (frame,) = arena.add(encode(series[2])[0])
    with monkeypatch.context() as patched:
        patched.setattr(module, "fill", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            arena.decode(frame)
    lazy.append(LazyDataset(encode(series[2])[0], decoded=arena))
    same(volume_grinder(lazy), volume_grinder(series))


def test_taking_waits_for_what_is_being_decoded() -> None:
    series = make_series(3, 5, 6)
    arena = new()
    sources = [encode(one)[0] for one in series]
    waiting = [frame for source in sources for frame in arena.add(source)]
    with ThreadPoolExecutor(1) as pool:
        volume = pool.submit(volume_grinder, [LazyDataset(one, decoded=arena) for one in sources])
        for frame in waiting[::-1]:
            assert not volume.done()
            arena.decode(frame)
        same(volume.result(10), volume_grinder(series))
        assert is_part_of_another(volume.result().array)


@pytest.mark.parametrize("end", ["close", "give_up"])
def test_nobody_waits_for_an_arena_that_is_over(end: str) -> None:
    series = make_series(3, 5, 6)
    arena = new()
    lazy = arrived(series, arena, decoded=False)
    with ThreadPoolExecutor(1) as pool:
        volume = pool.submit(volume_grinder, lazy)
        assert not volume.done()
        arena.close() if end == "close" else arena.give_up("the test says so")
        same(volume.result(10), volume_grinder(series))


def test_frames_that_come_late_to_an_arena_that_is_over() -> None:
    source = encode(make_series(1, 5, 6)[0])[0]
    arena = new()
    (frame,) = arena.add(source)
    arena.close()
    arena.decode(frame)
    assert arena.size == 0 and arena.add(source) == [] and arena.headers(source) is None


def test_many_threads_decode_at_once(tmp_path: Path) -> None:
    series = make_series(60, 33, 35)
    arena = new(most_bytes=10**8)
    sources = []
    for k, one in enumerate(compressed(series, JPEG_LS)):
        path = tmp_path / f"{k}.dcm"
        path.write_bytes(encode(one)[0])
        sources.append(str(path))
    frames: list[Frame] = [frame for source in sources for frame in arena.add(source)]
    random.Random(1).shuffle(frames)
    start = threading.Barrier(9)

    def decode(part: list[Frame]) -> None:
        start.wait(10)
        for frame in part:
            arena.decode(frame)

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(decode, frames[k::8]) for k in range(8)]
        start.wait(10)
        found = volume_grinder([LazyDataset(source, decoded=arena) for source in sources])
        assert all(one.result(10) is None for one in done)
    assert is_part_of_another(found.array)
    numpy.testing.assert_array_equal(found.array, volume_grinder(series).array)


def outcome(grinder: Any, given: list[Dataset], caplog: Any) -> tuple[Any, ...]:
    """The array, or the error; and what was logged."""
    caplog.clear()
    try:
        array = grinder(given)
    except (DicomnodeError, OSError) as error:
        return type(error), str(error)
    assert array.flags.c_contiguous and array.flags.writeable
    return array.dtype, array.shape, array.tobytes(), caplog.messages


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color": "raw"},
        {"color": "palette"},
        {"values": "stored", "dtype": "i4"},
        {"dtype": "f8"},
    ],
    ids=str,
)
def test_every_image_of_pydicom_is_that_of_the_ordinary_way(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    grinder = numpy_grinder(order="given", **options)
    parts = 0
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        arena = new(grinder.reading, 10**9)
        for frame in arena.add(str(path)):
            arena.decode(frame)
        parts += arena.size > 0
        given: list[Dataset] = [LazyDataset(str(path), decoded=arena)]
        expected = outcome(grinder, [LazyDataset(str(path))], caplog)
        assert outcome(grinder, given, caplog) == expected, path.name
        # Everything was taken, or given up.
        assert arena.size == 0, path.name
    assert parts > 40


def test_images_of_several_kinds_are_the_error_of_the_ordinary_way() -> None:
    from .test_color import colored, noise

    grey, color = make_series(2, 5, 6), colored(noise(1, 5, 6, 3))
    double = copy.deepcopy(grey[1])
    double.DoubleFloatPixelData = numpy.arange(30.0).tobytes()
    double.BitsAllocated = 64
    del double.PixelData, double.BitsStored, double.HighBit, double.PixelRepresentation
    grinder = numpy_grinder(order="given")
    for series in ([grey[0], color], [color, grey[0]]):
        with pytest.raises(InconsistentSeries, match="one kind"):
            grinder(arrived(series, new()))
    # The first alone would be float32; both are float64.
    found = grinder(arrived([grey[0], double], new()))
    numpy.testing.assert_array_equal(found, grinder(ordinary([grey[0], double])))
    assert found.dtype == numpy.float64


@pytest.mark.parametrize(
    ("policy", "spoil"),
    [
        ({"gaps": "fill"}, lambda series: series.pop(3)),
        ({"gaps": "resample"}, lambda series: series.pop(3)),
        ({"gaps": "keep"}, lambda series: series.pop(3)),
        ({"duplicates": "identical"}, lambda series: series.append(another(series[2]))),
        ({"duplicates": "last"}, lambda series: series.append(another(series[2]))),
        ({"duplicates": "error"}, lambda series: series.append(another(series[2]))),
        ({"tilt": "resample"}, lambda series: [tilted(one, k) for k, one in enumerate(series)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, "f4"])
def test_policies_are_those_of_the_ordinary_way(
    policy: dict[str, Any], spoil: Any, dtype: Any
) -> None:
    series = make_series(8, 9, 10)
    spoil(series)
    grinder = volume_grinder(dtype=dtype, **policy)
    results: list[Any] = []
    for given in (ordinary(series), arrived(series, new(grinder.reading))):
        try:
            results.append(grinder(given))
        except DicomnodeError as error:
            results.append(str(error))
    expected, found = results
    if isinstance(expected, Volume):
        same(found, expected)
    else:
        assert found == expected


def another(dataset: Dataset) -> Dataset:
    one = copy.deepcopy(dataset)
    one.SOPInstanceUID = generate_uid()
    return one


def tilted(one: Dataset, k: int) -> None:
    x, y, z = one.ImagePositionPatient
    one.ImagePositionPatient = [x, y + k * 0.5, z]


def test_a_mosaic_is_that_of_the_ordinary_way() -> None:
    from .test_layouts import mosaic

    one = mosaic(make_series(7, 5, 6))
    found = volume_grinder(arrived([one], new()))
    expected = volume_grinder(ordinary([one]))
    assert expected.shape[0] > 1
    same(found, expected)


def test_numbers_that_are_far_apart_take_no_memory_between_them() -> None:
    series = make_series(8, 64, 64)
    for k, one in enumerate(series):
        one.InstanceNumber = 1 + 100_000 * k
    arena = new(most_bytes=1 << 40)
    given = arrived(series, arena)
    assert arena.size <= 16 * series[0].Rows * series[0].Columns * 4
    same(volume_grinder(given), volume_grinder(ordinary(series)))
