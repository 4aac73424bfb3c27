"""Every fault that a node has to survive is a test with its number in the name, or a reason why not.

docs/reliability.md tells what they are: N of the network, C of content, S of storage, P of processes,
X of export, D of pages and logs.
"""

import ast
import re
from pathlib import Path

COUNTS = {"n": 20, "c": 20, "s": 7, "p": 10, "x": 7, "d": 6}
FAULTS = {f"{letter}{k}" for letter, count in COUNTS.items() for k in range(1, count + 1)}
TESTS = Path(__file__).parents[1]


def files_by_fault() -> dict[str, set[str]]:
    """The files in which tests have the number of a fault in their names."""
    found: dict[str, set[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        file = f"{path.parent.name}/{path.name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                # P is about pixels in the other tests of units.
                is_pixels = path.parent.name == "unit" and "worker" not in path.name
                letters = "ncsxd" if is_pixels else "ncsxdp"
                for fault in re.findall(rf"(?<=_)[{letters}]\d+(?=_)", node.name):
                    found.setdefault(fault, set()).add(file)
    return found


def rows() -> dict[str, str]:
    """The last cell of each row of the tables: where a fault is shown, or why not."""
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    found = re.findall(r"^\| ([NCSPXD]\d+) \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    return {fault.lower(): cell for fault, cell in found}


def test_every_fault_has_a_row() -> None:
    assert len(FAULTS) == 70
    assert rows().keys() == FAULTS


def test_every_fault_is_a_test_or_its_row_says_why_not() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    tests = files_by_fault()
    for fault, cell in rows().items():
        named = set(re.findall(r"`([\w/]+\.py)`", cell))
        assert named <= tests.get(fault, set()), fault
        (row,) = re.findall(rf"^\| {fault.upper()} \|.*$", page, re.MULTILINE)
        assert fault in tests or "not yet" in row or "no test: " in row, fault


def test_faults_that_are_shown_are_not_told_to_be_missing() -> None:
    told = {fault for fault, cell in rows().items() if "not yet" in cell}
    assert told & files_by_fault().keys() == set()
