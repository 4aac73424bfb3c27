"""An endpoint that writes down what it acknowledged: `python -m tests.faults.endpoint PORT JOURNAL`.

One line for each answer 0x0000, written before it is given: the SOPInstanceUID of the result, that of
the image it was made from, and the digest of its values.
"""

import hashlib
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, evt

TITLE = "RECORDER"


def digest_of_values(values: NDArray[Any]) -> str:
    """Of values that are whole numbers."""
    return hashlib.sha256(numpy.rint(values).astype("<i4").tobytes()).hexdigest()


def values_of(dataset: Dataset) -> NDArray[Any]:
    """The rescaled values of an image, by pydicom."""
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


def main(port: int, journal: Path) -> None:
    """Serve until killed."""
    with journal.open("a", encoding="ascii") as lines:

        def on_store(event: Any) -> int:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            source = dataset.SourceImageSequence[0].ReferencedSOPInstanceUID
            digest = digest_of_values(values_of(dataset))
            lines.write(f"{dataset.SOPInstanceUID} {source} {digest}\n")
            lines.flush()
            # So that a kill finds results that are stored and not yet acknowledged.
            time.sleep(random.uniform(0, 0.01))
            return 0x0000

        ae = AE(ae_title=TITLE)
        ae.supported_contexts = AllStoragePresentationContexts
        ae.add_supported_context("1.2.840.10008.1.1")
        ae.maximum_associations = 100
        ae.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, on_store)])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
