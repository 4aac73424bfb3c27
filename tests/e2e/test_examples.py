"""Every example runs against real associations, as its file stands."""

import runpy
import sys
from pathlib import Path

import numpy
import pytest
from pydicom import dcmread

from dicomnode.cli.pipeline import pipeline_in
from dicomnode.lib.dicom import load
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.grinders import numpy_grinder
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

EXAMPLES = Path(__file__).parents[2] / "examples"


def pipeline_of(name: str) -> type[AbstractPipeline]:
    """The pipeline that an example file defines; importing it opens nothing."""
    (kind,) = (
        value
        for value in runpy.run_path(str(EXAMPLES / name)).values()
        if isinstance(value, type)
        and issubclass(value, AbstractPipeline)
        and value is not AbstractPipeline
    )
    return kind


def test_every_example_has_a_test() -> None:
    assert [path.name for path in sorted(EXAMPLES.glob("*.py"))] == [
        "isolated.py",
        "plus_one.py",
    ]


@pytest.mark.parametrize("real", [False, True])
def test_plus_one(
    real: bool,
    storescp: tuple[Address, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    endpoint, folder = storescp
    source = load(request.getfixturevalue("ct_folder")) if real else make_series(140, 16, 16)
    with running_node(
        pipeline_of("plus_one.py"), root_data_directory=tmp_path / "root", endpoints=[endpoint]
    ) as node:
        assert {one.status for one in send(address_of(node), source)} == {0}
        wait_for_cases(node, State.DONE, seconds=90)
    arrived = [dcmread(path) for path in folder.iterdir()]
    assert len(arrived) == 140
    assert numpy.array_equal(numpy_grinder(arrived), numpy_grinder(source) + 1)


def test_isolated(storescp: tuple[Address, Path], tmp_path: Path) -> None:
    endpoint, folder = storescp
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pipeline_in(str(EXAMPLES / "isolated.py")) as kind,
        running_node(
            kind, root_data_directory=tmp_path / "root", endpoints=[endpoint], process_seconds=15
        ) as node,
    ):
        source = make_series(140, 16, 16)
        assert {one.status for one in send(address_of(node), source)} == {0}
        wait_for_cases(node, State.DONE)
    with (
        pipeline_in(str(EXAMPLES / "isolated.py")) as kind,
        running_node(
            kind, root_data_directory=tmp_path / "root", program=hangs, process_seconds=2
        ) as node,
    ):
        send(address_of(node), make_series(140, 16, 16, patient_id="HANGS"))
        wait_for_cases(node, State.FAILED)
        (case,) = (one for one in node.cases() if one.state is State.FAILED)
        assert "not processed within process_seconds 2" in case.error
    arrived = [dcmread(path) for path in folder.iterdir()]
    assert len(arrived) == 140
    smoothed, voxels = numpy_grinder(arrived), numpy_grinder(source)
    voxels[1:-1] = (voxels[:-2] + voxels[1:-1] + voxels[2:]) / 3
    assert abs(smoothed - voxels).max() < 0.1
