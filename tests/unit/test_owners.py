"""Which images came under which identifier."""

from dicomnode.server.owners import Owners


def test_the_first_identifier_of_an_image_is_remembered() -> None:
    owners = Owners()
    assert not owners.is_other("1.2.3", "A")
    assert not owners.is_other("1.2.3", "A")
    assert owners.is_other("1.2.3", "B")
    assert owners.is_other("1.2.3", "B")
    assert not owners.is_other("1.2.3", "A")


def test_of_the_newest_images_hardly_any_is_forgotten() -> None:
    owners = Owners()
    for k in range(300_000):
        assert not owners.is_other(f"2.25.{k}", f"P{k // 100}")
    known = sum(owners.is_other(f"2.25.{k}", "OTHER") for k in range(250_000, 300_000))
    assert known > 49_900
