"""A node that has another program process each case, and outlives whatever that program does.

dicomnode doctor --pipeline examples/isolated.py
dicomnode run examples/isolated.py --root isolated-data

The program gets the voxels as a file and leaves a file. If it crashes, hangs, or takes all memory, that
case is FAILED with the reason and kept, and the next one goes on.
"""

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy
from pydicom.dataset import Dataset

from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline

# Stands for any program that is not yours.
SMOOTH = """
import numpy
voxels = numpy.load("in.npy")
voxels[1:-1] = (voxels[:-2] + voxels[1:-1] + voxels[2:]) / 3
numpy.save("out.npy", voxels)
"""


class CTSeries(AbstractInput):
    expected_images = 140
    required_values = {"Modality": "CT"}
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= self.expected_images


class Isolated(AbstractPipeline):
    ip = "127.0.0.1"
    port = 11114
    ae_title = "ISOLATED"
    input = {"ct": CTSeries}
    endpoints = [Address("127.0.0.1", 11113, "STORE")]
    root_data_directory = "isolated-data"

    isolation = "process"
    workers = 2
    # A minute for a case, and 2 GiB for the worker and the program together.
    process_seconds = 60
    process_memory = 2 << 30
    program = [sys.executable, "-c", SMOOTH]

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        # The folder is empty, belongs to this case, and is gone after it.
        numpy.save("in.npy", array)
        subprocess.run(self.program, check=True)
        return derive_series(numpy.load("out.npy"), images, series_description="smoothed")


if __name__ == "__main__":
    Isolated()
