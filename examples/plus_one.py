"""The smallest whole node: it takes a CT series, adds one to every voxel, and sends the result on.

dicomnode run examples/plus_one.py --root plus-one-data
"""

from collections.abc import Iterable
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.lib.dimse import Address
from dicomnode.lib.grinders import list_grinder, many_meta_grinder, numpy_grinder
from dicomnode.lib.series import derive_series
from dicomnode.server.input import AbstractInput
from dicomnode.server.node import AbstractPipeline


class CTSeries(AbstractInput):
    """One CT series. DICOM does not tell how many images a series has, so you have to know."""

    expected_images = 140
    required_values = {"Modality": "CT"}
    image_grinder = many_meta_grinder(list_grinder, numpy_grinder)

    def validate(self) -> bool:
        return self.images >= self.expected_images


class PlusOne(AbstractPipeline):
    ip = "127.0.0.1"
    port = 11112
    ae_title = "PLUSONE"
    input = {"ct": CTSeries}
    endpoints = [Address("127.0.0.1", 11113, "STORE")]
    root_data_directory = "plus-one-data"

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        return derive_series(array + 1, images, series_description="plus one")


if __name__ == "__main__":
    PlusOne()
