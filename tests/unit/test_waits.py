"""Cases that wait, in the storage: forced, revised, expired; also across a crash."""

from pathlib import Path

import pytest
from tests.unit.test_storage import claim, instances, make_ready, opened

from dicomnode.errors import UnknownCase
from dicomnode.storage.instances import FileInstances
from dicomnode.storage.ledger import Ledger, State
from dicomnode.storage.store import Storage
from dicomnode.storage.waits import Wait, Waits


def expire(storage: Storage, identifier: str) -> bool:
    contents = storage.current(identifier)
    assert contents is not None
    return storage.expire(identifier, contents)


def test_what_is_known_of_a_wait_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        assert storage.waits.of(number) == Wait()
        storage.waits.keep({number: 12.5})
        storage.waits.tell(number, "for a slice")
        storage.waits.conflict(number, "1.2.3")
    with opened(tmp_path) as storage:
        assert storage.waits.of(number) == Wait(12.5, "for a slice", conflict="1.2.3")


@pytest.mark.parametrize("state", [State.RECEIVING, State.READY, State.FAILED])
def test_a_case_that_was_not_processed_can_be_forced(state: State) -> None:
    with opened(None) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        storage.ledger.move(number, State.RECEIVING, state, error="why")
        storage.waits.force(number)
        case = storage.ledger.case(number)
        assert (case.state, case.error) == (State.READY, "")
        assert storage.waits.of(number).forced


@pytest.mark.parametrize("state", [State.PROCESSING, State.EXPORTING, State.DONE, State.EXPIRED])
def test_a_case_that_is_further_cannot_be_forced(state: State) -> None:
    with opened(None) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        storage.ledger.move(number, State.RECEIVING, state)
        with pytest.raises(UnknownCase, match=f"case 1 is {state.value}"):
            storage.waits.force(number)


def test_a_case_with_results_or_without_images_cannot_be_forced() -> None:
    with opened(None) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        make_ready(storage, number)
        claim(storage, number)
        storage.results.keep(storage.ledger.case(number), iter([("1.1", "1", "1", b"x")]))
        storage.fail(number, "no endpoint")
        with pytest.raises(UnknownCase, match="retry it"):
            storage.waits.force(number)
        empty = storage.ledger.open_case("Q", "Q")
        with pytest.raises(UnknownCase, match="holds no image"):
            storage.waits.force(empty.id)
        with pytest.raises(UnknownCase, match="there is no case 99"):
            storage.waits.force(99)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_revision_has_all_images_and_takes_none_from_the_earlier_case(
    on_disk: bool, tmp_path: Path
) -> None:
    first, second, late = instances(3)
    with opened(tmp_path if on_disk else None) as storage:
        earlier = storage.add("P", ["ct", "mr"], first)
        storage.add("P", ["ct"], second)
        make_ready(storage, earlier)
        claim(storage, earlier)
        number = storage.add("P", ["ct"], late)
        contents = storage.current("P")
        assert contents is not None
        assert storage.revise("P", contents, storage.ledger.case(earlier)) == 3
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle
        uids = {one.sop_instance_uid for one in (first, second, late)}
        assert set(contents.sources["ct"]) == uids
        assert set(contents.sources["mr"]) == {first.sop_instance_uid}
        # The earlier case ends, and the revision still has everything.
        storage.results.keep(storage.ledger.case(earlier), iter([]))
        storage.finish(storage.ledger.case(earlier))
        if on_disk:
            for source in contents.sources["ct"].values():
                assert Path(str(source)).stat().st_nlink == 1 + (
                    source == contents.sources["ct"][first.sop_instance_uid]
                )
        make_ready(storage, number)
        storage.verify(storage.ledger.case(number))
        assert claim(storage, number)
        assert storage.waits.of(number).revises == earlier


def test_a_late_image_that_comes_with_all_others_makes_a_revision_too(tmp_path: Path) -> None:
    images = instances(3)
    with opened(tmp_path) as storage:
        earlier = storage.add("P", ["ct"], images[0])
        storage.add("P", ["ct"], images[1])
        make_ready(storage, earlier)
        claim(storage, earlier)
        for one in images:
            number = storage.add("P", ["ct"], one)
        contents = storage.current("P")
        assert contents is not None
        assert storage.revise("P", contents, storage.ledger.case(earlier)) == 0
        assert storage.waits.of(number).revises == earlier


def test_an_earlier_case_that_is_done_gives_nothing(tmp_path: Path) -> None:
    first, late = instances(2)
    with opened(tmp_path) as storage:
        earlier = storage.add("P", ["ct"], first)
        make_ready(storage, earlier)
        claim(storage, earlier)
        storage.add("P", ["ct"], late)
        contents = storage.current("P")
        assert contents is not None
        storage.results.keep(storage.ledger.case(earlier), iter([]))
        storage.finish(storage.ledger.case(earlier))
        assert storage.revise("P", contents, storage.ledger.case(earlier)) is None
        assert len(storage.waits.series(earlier)) == 1


def test_a_damaged_image_of_the_earlier_case_is_waited_for_by_the_revision(tmp_path: Path) -> None:
    first, second, late = instances(3)
    with opened(tmp_path) as storage:
        earlier = storage.add("P", ["ct"], first)
        storage.add("P", ["ct"], second)
        make_ready(storage, earlier)
        claim(storage, earlier)
        (tmp_path / "P/ct/Image_CT_1.dcm").write_bytes(b"broken")
        storage.verify(storage.ledger.case(earlier))
        storage.add("P", ["ct"], late)
        contents = storage.current("P")
        assert contents is not None
        storage.revise("P", contents, storage.ledger.case(earlier))
        contents = storage.current("P")
        assert contents is not None
        assert contents.obstacle == (
            f"instance {first.sop_instance_uid} is damaged and was set aside; send it again"
        )
        storage.add("P", ["ct"], first)
        contents = storage.current("P")
        assert contents is not None and not contents.obstacle and len(contents.sources["ct"]) == 3


def test_a_crash_between_the_links_of_a_revision_and_their_rows_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, late = instances(3)
    with opened(tmp_path) as storage:
        earlier = storage.add("P", ["ct"], first)
        storage.add("P", ["ct"], second)
        make_ready(storage, earlier)
        claim(storage, earlier)
        storage.add("P", ["ct"], late)
        contents = storage.current("P")
        assert contents is not None
        real, count = FileInstances.place, 0

        def dying(self: FileInstances, *arguments: object) -> str:
            nonlocal count
            count += 1
            if count == 2:
                raise SystemExit("killed")
            return real(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(FileInstances, "place", dying)
        with pytest.raises(SystemExit):
            storage.revise("P", contents, storage.ledger.case(earlier))
        monkeypatch.undo()
    with opened(tmp_path) as storage:
        # The link that was made is adopted, since it lies in the folder of the open case.
        contents = storage.current("P")
        assert contents is not None and len(contents.sources["ct"]) == 2
        assert storage.revise("P", contents, storage.ledger.case(earlier)) == 1
        contents = storage.current("P")
        assert contents is not None and len(contents.sources["ct"]) == 3


def test_a_case_expires_with_its_files_and_what_was_sealed_does_not(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct", "mr"], instances(1)[0])
        sealed = storage.add("Q", ["ct"], instances(1, "Q")[0])
        make_ready(storage, sealed)
        contents = storage.current("Q")
        assert contents is not None
        assert not storage.expire("Q", contents), "it is READY"
        claim(storage, sealed)
        assert not storage.expire("Q", contents), "it is PROCESSING"
        assert expire(storage, "P")
        assert storage.ledger.case(number).state is State.EXPIRED
        assert not (tmp_path / "P").exists() and (tmp_path / "Q/ct/Image_CT_1.dcm").exists()
        assert storage.add("P", ["ct"], instances(1)[0]) != number


def test_an_image_that_came_meanwhile_keeps_a_case_from_expiring() -> None:
    first, second = instances(2)
    with opened(None) as storage:
        storage.add("P", ["ct"], first)
        contents = storage.current("P")
        assert contents is not None
        storage.add("P", ["ct"], second)
        assert not storage.expire("P", contents)
        assert len(storage.ledger.instances(1)) == 2


def test_a_crash_while_a_case_expires_is_made_good_at_the_next_start(tmp_path: Path) -> None:
    with opened(tmp_path) as storage:
        number = storage.add("P", ["ct"], instances(1)[0])
        assert storage.waits.expire(number)
    with opened(tmp_path) as storage:
        assert not (tmp_path / "P").exists()
        assert storage.ledger.instances(number) == []
        assert storage.open_identifiers() == []


def test_what_expired_and_is_sent_again_is_no_repeat(tmp_path: Path) -> None:
    (one,) = instances(1)
    with opened(tmp_path) as storage:
        storage.interrupt([storage.add("P", ["ct"], one)])
        assert expire(storage, "P")
        storage.add("P", ["ct"], one)
        contents = storage.current("P")
        assert contents is not None and storage.park("P", contents) is None


def test_what_is_known_of_cases_that_are_forgotten_is_forgotten() -> None:
    ledger = Ledger(None)
    waits = Waits(ledger)
    for k in range(3):
        case = ledger.open_case(f"P{k}", f"P{k}")
        waits.tell(case.id, "why")
        waits.remember_series(case.id, [f"1.{k}"])
        ledger.move(case.id, State.RECEIVING, State.DONE, seal=True)
    ledger.forget(1)
    waits.forget()
    assert [waits.of(number).reason for number in (1, 2, 3)] == ["", "", "why"]
    assert [waits.series(number) for number in (1, 2, 3)] == [set(), set(), {"1.2"}]


def test_a_late_revision_takes_earlier_failed_cases_along_when_it_is_done() -> None:
    first, second, third = instances(3)
    with opened(None) as storage:
        numbers = []
        for one in (first, second, third):
            numbers.append(storage.add("P", ["ct"], one))
            if len(numbers) > 1:
                contents = storage.current("P")
                assert contents is not None
                storage.revise("P", contents, storage.ledger.case(numbers[-2]))
            make_ready(storage, numbers[-1])
            claim(storage, numbers[-1])
            if one is not third:
                storage.fail(numbers[-1], "a slice is missing")
        storage.results.keep(storage.ledger.case(numbers[-1]), iter([]))
        storage.finish(storage.ledger.case(numbers[-1]))
        assert [case.state for case in storage.ledger.cases()] == [State.DONE] * 3
        assert not any(storage.ledger.instances(number) for number in numbers)
