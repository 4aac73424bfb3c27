"""UIDs of results: the same for the same run, others for anything else."""

import threading
from pathlib import Path

from dicomnode.lib.dicom import LazyDataset, encode, is_uid
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.lib.uids import SeriesUids, Uids
from dicomnode.storage.ledger import Ledger
from dicomnode.testing import make_series

SOURCES = [encode(image)[0] for image in make_series(3, 4, 4)]


def derived(seed: bytes | None, *descriptions: str, order: int = 1) -> list[str]:
    uids = None if seed is None else Uids(seed)
    images = [LazyDataset(source, uids=uids) for source in SOURCES][::order]
    array = numpy_grinder(images)
    return [
        str(uid)
        for text in descriptions
        for one in derive_series(array, images, series_description=text)
        for uid in (one.SeriesInstanceUID, one.SOPInstanceUID)
    ]


def test_the_same_run_gives_the_same_uids_whatever_the_order_of_the_images() -> None:
    assert derived(b"1", "a") == derived(b"1", "a") == derived(b"1", "a", order=-1)
    assert all(is_uid(uid) and uid.startswith("2.25.") for uid in derived(b"1", "a"))


def test_another_run_another_series_and_a_second_one_alike_have_others() -> None:
    found = derived(b"1", "a", "b", "a") + derived(b"2", "a")
    assert len(set(found)) == 4 * (1 + 3)


def test_images_from_elsewhere_get_random_uids() -> None:
    assert not set(derived(None, "a")) & set(derived(None, "a"))
    assert SeriesUids().series() != SeriesUids().series()


def test_threads_of_user_code_have_them_too() -> None:
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(derived(b"1", "a")))
    thread.start()
    thread.join()
    assert found == [derived(b"1", "a")]


def test_a_seed_is_that_of_a_ledger_and_a_case(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "1.sqlite"), Ledger(tmp_path / "2.sqlite")
    one, two = first.open_case("A", "A").id, first.open_case("B", "B").id
    second.open_case("A", "A")
    seeds = [first.seed(one), first.seed(two), second.seed(one)]
    first.close()
    second.close()
    again = Ledger(tmp_path / "1.sqlite")
    assert again.seed(one) == seeds[0] and len(set(seeds)) == 3
    # A retry that has results made anew is another run.
    again.fail(one, "wrong")
    again.retry(one)
    assert again.seed(one) != seeds[0]
    again.close()
