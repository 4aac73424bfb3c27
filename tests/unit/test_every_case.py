"""Every case that a reader of volumes has to get right is a test with its number in the name.

G1 to G64 are about geometry, P1 to P28 about pixels; docs/awkward-series.md tells what they are.
"""

import ast
import re
from pathlib import Path

CASES = {f"g{k}" for k in range(1, 65)} | {f"p{k}" for k in range(1, 29)}


def test_every_case_is_a_test() -> None:
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found |= set(re.findall(r"(?<=_)[gp]\d+(?=_)", node.name))
    assert CASES - found == set()
    assert {name for name in found if name[0] in "gp"} - CASES == set()
