"""The fuzzers, for seconds; `make fuzz` runs them for minutes."""

from tests.fuzz import codecs


def test_mutated_codestreams_are_errors_or_images_within_a_moment() -> None:
    assert codecs.run(seed=1, seconds=10.0) > 300
