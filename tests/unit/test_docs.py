"""Every Python block of the documentation runs: in order, one namespace for each page."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(text: str) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, each with the line of its first statement."""
    for block in FENCE.finditer(text):
        yield text.count("\n", 0, block.start(1)) + 1, block[1]


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        page
        for page in found
        if "_build" not in page.parts and FENCE.search(page.read_text("utf-8"))
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    before = set(threading.enumerate())
    for line, source in blocks_of(page.read_text("utf-8")):
        # Empty lines in front, so that a traceback shows the line of the page.
        code = compile("\n" * (line - 1) + source, page, "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            raise AssertionError(f"the block at {page.relative_to(ROOT)}:{line} fails") from error
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(10)
    assert not [thread.name for thread in left if thread.is_alive()]


def test_the_pages_that_teach_have_blocks() -> None:
    expected = {
        "README.md",
        "docs/getting-started.md",
        "docs/dicom-for-dummies.md",
        "docs/python-software-engineering.md",
    }
    assert expected <= {str(page.relative_to(ROOT)) for page in pages()}


def test_blocks_are_found_with_their_line() -> None:
    text = "# T\n\n```python\na = 1\n```\n\n```console\n$ ls\n```\n\n```python\nb\nc\n```\n"
    assert list(blocks_of(text)) == [(4, "a = 1\n"), (12, "b\nc\n")]
