"""Series that are made: a CT of a phantom with known values, in any size."""

from collections.abc import Iterable
from pathlib import Path

import numpy
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicomnode.lib.dicom import encode


def make_series(
    slices: int = 8,
    rows: int = 32,
    columns: int = 40,
    *,
    patient_id: str = "PHANTOM-1",
    spacing_mm: tuple[float, float, float] = (2.5, 0.8, 0.75),
    origin_mm: tuple[float, float, float] = (-100.0, -90.0, 50.0),
    orientation: tuple[float, float, float, float, float, float] = (1, 0, 0, 0, 1, 0),
    modality: str = "CT",
    sop_class_uid: str = CTImageStorage,
    seed: int = 1,
) -> list[Dataset]:
    """A CT series of a phantom: an ellipsoid of water with a bone and an air insert, and noise.

    16 bit, 12 stored, slope 1, intercept -1024, Explicit VR Little Endian. `spacing_mm` is (slice,
    row, column); positions step along the normal of `orientation`, ascending with InstanceNumber.
    The values depend on `seed` alone, the UIDs are new with each call.
    """
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    direction = numpy.array(orientation, numpy.float64)
    normal = numpy.cross(direction[:3], direction[3:])
    values = phantom(slices, rows, columns, seed)
    datasets = []
    for k in range(slices):
        position = numpy.array(origin_mm) + normal * spacing_mm[0] * k
        dataset = Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SOPClassUID = sop_class_uid
        dataset.SOPInstanceUID = generate_uid()
        dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20260102"
        dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "120000"
        dataset.AccessionNumber = ""
        dataset.Modality = modality
        dataset.Manufacturer = "dicomnode"
        dataset.ReferringPhysicianName = ""
        dataset.SeriesDescription = "Phantom"
        dataset.Laterality = ""
        dataset.PatientName = "Phantom^Test"
        dataset.PatientID = patient_id
        dataset.PatientBirthDate = "19700101"
        dataset.PatientSex = "O"
        dataset.SliceThickness = f"{spacing_mm[0]:g}"
        dataset.KVP = "120"
        dataset.PatientPosition = "HFS"
        dataset.StudyInstanceUID = study
        dataset.SeriesInstanceUID = series
        dataset.StudyID = "1"
        dataset.SeriesNumber = 1
        dataset.AcquisitionNumber = 1
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = [f"{value:.6g}" for value in position]
        dataset.ImageOrientationPatient = [f"{value:.10g}" for value in direction]
        dataset.FrameOfReferenceUID = frame
        dataset.PositionReferenceIndicator = ""
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.Rows, dataset.Columns = rows, columns
        dataset.PixelSpacing = [f"{spacing_mm[1]:g}", f"{spacing_mm[2]:g}"]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "-1024", "1", "HU"
        dataset.PixelData = values[k].astype("<u2").tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        datasets.append(dataset)
    return datasets


def phantom(slices: int, rows: int, columns: int, seed: int = 1) -> NDArray[numpy.uint16]:
    """Stored values (HU + 1024) of the phantom, (slice, row, column), between 0 and 4095."""
    z = numpy.linspace(-1, 1, slices + 2)[1:-1, None, None]
    y = numpy.linspace(-1, 1, rows)[:, None]
    x = numpy.linspace(-1, 1, columns)
    hounsfield = numpy.full((slices, rows, columns), -1000.0, numpy.float32)
    hounsfield[(x / 0.75) ** 2 + (y / 0.85) ** 2 + z**2 / 4 < 0.8] = 0
    hounsfield[(x - 0.3) ** 2 + y**2 + z**2 < 0.04] = 900
    hounsfield[(x + 0.3) ** 2 + y**2 + z**2 < 0.05] = -700
    noise = numpy.random.default_rng(seed).normal(0, 12, (1, rows, columns))
    return (hounsfield + noise + 1024).clip(0, 4095).astype(numpy.uint16)


def write_series(datasets: Iterable[Dataset], folder: Path) -> list[Path]:
    """Datasets as files `0001.dcm`, ... in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets, 1):
        path = folder / f"{number:04}.dcm"
        path.write_bytes(encode(dataset)[0])
        paths.append(path)
    return paths
