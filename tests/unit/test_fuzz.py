"""The fuzzers, for seconds, and what they found; `make fuzz` runs them for minutes."""

import numpy
import pytest
from tests.fuzz import corpus, decode, port
from tests.unit import test_codecs as known

from dicomnode.errors import DicomnodeError, UnsupportedImage
from dicomnode.lib.dicom import LazyDataset
from dicomnode.lib.grinders import numpy_grinder


def test_mutated_objects_are_errors_or_arrays_within_a_moment() -> None:
    assert decode.run(seed=1, seconds=10.0) > 300


def test_n20_a_node_serves_others_whatever_is_sent_to_its_port() -> None:
    found = port.run(seed=1, seconds=8.0)
    assert found.sessions >= 100


def test_an_array_for_which_there_is_no_memory_is_an_error_that_names_the_image() -> None:
    data = corpus.part10(known.RLE, b"", (65_535, 65_535), 16)
    with pytest.raises(DicomnodeError, match=r"1\.2\.3"):
        numpy_grinder([LazyDataset(data)], order="given", dtype=numpy.float64)


def test_thousands_of_samples_are_an_error_before_memory_is_taken_for_them() -> None:
    data = corpus.part10(known.RLE, b"", (512, 512), 16)
    one, many = b"\x28\0\x02\0US\x02\0\x01\0", b"\x28\0\x02\0US\x02\0\xff\xff"
    assert data.count(one) == 1
    with pytest.raises(UnsupportedImage, match=r"1\.2\.3 has SamplesPerPixel 65535"):
        numpy_grinder([LazyDataset(data.replace(one, many))], order="given")


def test_colours_of_single_bits_are_an_error_and_no_zeros() -> None:
    data = corpus.part10(known.PLAIN, b"\xff" * 6, (4, 4), 8)
    for old, new in (
        (b"\x28\0\x02\0US\x02\0\x01\0", b"\x28\0\x02\0US\x02\0\x03\0"),
        (b"\x28\0\0\x01US\x02\0\x08\0", b"\x28\0\0\x01US\x02\0\x01\0"),
        (b"MONOCHROME2 ", b"RGB         "),
        # Rescale becomes Window, so that the dtype is that of the cells.
        (b"\x28\0\x52\x10DS", b"\x28\0\x50\x10DS"),
        (b"\x28\0\x53\x10DS", b"\x28\0\x51\x10DS"),
    ):
        assert data.count(old) == 1
        data = data.replace(old, new)
    with pytest.raises(UnsupportedImage, match=r"1\.2\.3: .*SamplesPerPixel"):
        numpy_grinder([LazyDataset(data)], order="given")
