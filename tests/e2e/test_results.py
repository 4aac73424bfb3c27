"""Results of every kind reach an archive that we did not write; what it could refuse never leaves."""

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from dicomnode.lib.dicom import encode
from dicomnode.lib.dimse import Address, send
from dicomnode.lib.series import derive_series
from dicomnode.server.node import AbstractPipeline
from dicomnode.testing import State, address_of, make_series, running_node, wait_for_cases

from .misbehaving import Two


class Reporting(AbstractPipeline):
    """Gives a series, segments, a report and a document, and what is wrong where it is asked to."""

    ip, port, ae_title = "127.0.0.1", 0, "NODE"
    input = {"ct": Two}
    document = ""

    def process(self, input_data: dict[str, Any]) -> Iterable[Dataset]:
        images, array = input_data["ct"]
        yield from derive_series(array + 1, images)
        source = [pydicom.dcmread(pydicom.filebase.DicomBytesIO(encode(one)[0])) for one in images]
        yield segments(source, array > 0)
        yield report(source)
        document = pydicom.dcmread(self.document)
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID"):
            setattr(document, keyword, source[0][keyword].value)
        document.SOPInstanceUID, document.SeriesInstanceUID = generate_uid(), generate_uid()
        wish = source[0].SeriesDescription
        if wish == "NOSERIES":
            del document.SeriesInstanceUID
        yield document


def segments(source: list[Dataset], mask: Any) -> Dataset:
    import highdicom as hd

    tissue, manual = codes.cid7150.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    return hd.seg.Segmentation(
        source, mask.astype(numpy.uint8), "BINARY",
        [hd.seg.SegmentDescription(1, "1", tissue, tissue, manual)],
        hd.UID(), 1, hd.UID(), 1, "m", "mm", "1", "1",
    )  # fmt: skip


def report(source: list[Dataset]) -> Dataset:
    import highdicom as hd

    device = hd.sr.DeviceObserverIdentifyingAttributes(hd.UID())
    context = hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(codes.DCM.Device, device)
    )
    measured = hd.sr.MeasurementsAndQualitativeEvaluations(
        hd.sr.TrackingIdentifier(hd.UID(), "whole"),
        measurements=[hd.sr.Measurement(codes.SCT.Volume, 3.0, codes.UCUM.CubicMillimeter)],
        source_images=[hd.sr.SourceImageForMeasurementGroup.from_source_image(source[0])],
    )
    content = hd.sr.MeasurementReport(context, codes.LN.CTUnspecifiedBodyRegion, [measured])
    return hd.sr.Comprehensive3DSR(source, content, hd.UID(), 1, hd.UID(), 1, manufacturer="m")


@pytest.fixture
def document(peer: Callable[[str], str], tmp_path: Path) -> Path:
    """A PDF as dcmtk puts it into DICOM."""
    pdf, path = tmp_path / "one.pdf", tmp_path / "one.dcm"
    pdf.write_bytes(b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n")
    subprocess.run([peer("pdf2dcm"), str(pdf), str(path)], check=True)
    return path


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_p6_results_of_every_kind_reach_the_archive_and_none_of_a_case_with_a_wrong_one(
    isolation: str, document: Path, storescp: tuple[Address, Path], tmp_path: Path
) -> None:
    pytest.importorskip("highdicom")
    endpoint, folder = storescp
    with running_node(
        Reporting,
        root_data_directory=tmp_path / "root",
        isolation=isolation,
        endpoints=[endpoint],
        document=str(document),
    ) as node:
        wrong = make_series(3, patient_id="WRONG")
        for image in wrong:
            image.SeriesDescription = "NOSERIES"
        send(address_of(node), wrong)
        wait_for_cases(node, State.FAILED)
        send(address_of(node), make_series(3, patient_id="RIGHT"))
        wait_for_cases(node, State.DONE)
        (failed,) = (case for case in node.cases() if case.state is State.FAILED)
        assert failed.identifier == "WRONG"
        said = failed.error.splitlines()[-1]
        assert "(0020,000E) SeriesInstanceUID is missing or empty; give all results" in said
    received = [pydicom.dcmread(path) for path in folder.iterdir()]
    assert {one.PatientID for one in received} == {"RIGHT"}
    kinds = sorted(one.Modality for one in received)
    assert kinds == ["CT", "CT", "CT", "DOC", "SEG", "SR"]
