"""How long does a compressed series take from files to a rescaled float32 volume?

The slices are those of a CT series, compressed here. "imagecodecs" knows the syntax, finds the frame with
pydicom and checks nothing; its libraries are those of the fastest peers. The row of dcm2niix is a whole run
of the program, which writes a file that nibabel reads. JPEG Baseline holds 8 bits, a window of the CT, and
decoders of it may be one stored value apart.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame

from benchmarks import grind_files
from benchmarks.series import Array, in_slice_order, reference_volume, same_volume
from benchmarks.timing import Peer
from dicomnode.lib.dicom import load
from dicomnode.lib.grinders import volume_grinder

Cells = NDArray[numpy.generic]


@dataclass(frozen=True)
class Syntax:
    """A transfer syntax: how a frame of it is made and, by the fastest peer, read again."""

    uid: str
    encode: Callable[[Any, Cells], bytes]
    decode: Callable[[Any, bytes], Cells]
    slices: int = 60
    narrow: bool = False
    tolerance: float = 0


SYNTAXES = {
    "JPEG Lossless SV1": Syntax(
        "1.2.840.10008.1.2.4.70",
        lambda codecs, cells: bytes(codecs.jpeg8_encode(cells, lossless=True, predictor=1)),
        lambda codecs, frame: codecs.jpeg8_decode(frame),
    ),
    "JPEG-LS Lossless": Syntax(
        "1.2.840.10008.1.2.4.80",
        lambda codecs, cells: bytes(codecs.jpegls_encode(cells)),
        lambda codecs, frame: codecs.jpegls_decode(frame),
    ),
    "JPEG 2000 Lossless": Syntax(
        "1.2.840.10008.1.2.4.90",
        lambda codecs, cells: bytes(
            codecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="j2k")
        ),
        lambda codecs, frame: codecs.jpeg2k_decode(frame),
        slices=20,
    ),
    "HTJ2K Lossless": Syntax(
        "1.2.840.10008.1.2.4.201",
        lambda codecs, cells: bytes(codecs.htj2k_encode(cells, reversible=True)),
        lambda codecs, frame: codecs.htj2k_decode(frame),
    ),
    "JPEG XL Lossless": Syntax(
        "1.2.840.10008.1.2.4.110",
        lambda codecs, cells: bytes(codecs.jpegxl_encode(cells, lossless=True, effort=3)),
        lambda codecs, frame: codecs.jpegxl_decode(frame),
        slices=20,
    ),
    "RLE Lossless": Syntax(
        "1.2.840.10008.1.2.5",
        lambda _, cells: _packed(cells),
        lambda codecs, frame: codecs.dicomrle_decode(frame, "<u2"),
    ),
    "JPEG Baseline": Syntax(
        "1.2.840.10008.1.2.4.50",
        lambda codecs, cells: bytes(codecs.jpeg8_encode(cells, level=95)),
        lambda codecs, frame: codecs.jpeg8_decode(frame),
        narrow=True,
        tolerance=1,
    ),
}


def _packed(cells: Cells) -> bytes:
    from pydicom.pixels.encoders import RLELosslessEncoder

    return RLELosslessEncoder.encode(
        cells.astype("<u2").tobytes(), rows=cells.shape[0], columns=cells.shape[1],
        samples_per_pixel=1, number_of_frames=1, bits_allocated=16, bits_stored=16,
        pixel_representation=0, photometric_interpretation="MONOCHROME2", encoding_plugin="pydicom",
    )  # fmt: skip


def write(source: Path, folder: Path, syntax: Syntax) -> Path:
    """The middle slices of a native series, compressed."""
    import imagecodecs

    folder.mkdir(parents=True)
    ordered = in_slice_order(source)
    first = max(0, (len(ordered) - syntax.slices) // 2)
    for path in ordered[first : first + syntax.slices]:
        dataset = pydicom.dcmread(path)
        cells = dataset.pixel_array.view("<u2")
        if syntax.narrow:
            cells = _window(dataset)
        dataset.PixelData = encapsulate([syntax.encode(imagecodecs, cells)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax.uid
        dataset.save_as(folder / path.name)
    return folder


def _window(dataset: pydicom.Dataset) -> Cells:
    """Stored values of a soft tissue window as 8 bits, and the attributes that say so."""
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    values = dataset.pixel_array * slope + intercept
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "2", "-200"
    for keyword in ("PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in dataset:
            delattr(dataset, keyword)
    cells: Cells = ((values + 200) / 2).clip(0, 255).astype(numpy.uint8)
    return cells


class Compressed:
    """The question for one transfer syntax, over the native series that it was made from."""

    def __init__(self, name: str, native: Path) -> None:
        self.TITLE = f"{SYNTAXES[name].slices} CT slices in {name} from files to float32"
        self._syntax = SYNTAXES[name]
        self._native = native

    def reference(self, folder: Path) -> Array:
        if self._syntax.tolerance:
            return reference_volume(folder)
        names = {path.name for path in folder.iterdir()}
        return reference_volume(self._native, names)

    def same(self, result: object, reference: Array) -> bool:
        if not self._syntax.tolerance:
            return same_volume(result, reference)
        array = getattr(result, "array", result)
        apart = numpy.abs(numpy.asarray(array, numpy.float32) - reference)
        return bool(apart.max() <= 2 * self._syntax.tolerance)

    def peers(self, folder: Path) -> list[Peer]:
        """Ours first."""
        datasets = load(folder)
        return [
            Peer("dicomnode volume_grinder(datasets)", lambda: volume_grinder(datasets)),
            Peer("dicomnode volume_grinder(load(folder))", lambda: volume_grinder(load(folder))),
            *self._imagecodecs(folder),
            *(
                peer
                for peer in grind_files.peers(folder)
                if peer.name.startswith(
                    ("dicomsdl", "pydicom pixel_array, pre", "SimpleITK, files")
                )
            ),
            Peer("GDCM ImageReader, loop by hand", lambda: _gdcm(folder)),
            *_dcm2niix(folder),
        ]

    def _imagecodecs(self, folder: Path) -> list[Peer]:
        import imagecodecs

        ordered = in_slice_order(folder)

        def run(threads: int) -> Array:
            first = pydicom.dcmread(ordered[0], stop_before_pixels=True)
            out = numpy.empty((len(ordered), first.Rows, first.Columns), numpy.float32)
            kind = _stored_type(first)

            def read(k: int) -> None:
                one = pydicom.dcmread(ordered[k])
                frame = get_frame(one.PixelData, 0, number_of_frames=1)
                # Of RLE the codec gives bytes, of all others an array.
                decoded = self._syntax.decode(imagecodecs, frame)
                stored = numpy.frombuffer(decoded, kind).reshape(out[k].shape)
                numpy.multiply(stored, numpy.float32(one.RescaleSlope), out=out[k])
                out[k] += numpy.float32(one.RescaleIntercept)

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, range(len(ordered))))
            return out

        frames = [
            get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1) for path in ordered
        ]

        def alone() -> None:
            for frame in frames:
                self._syntax.decode(imagecodecs, frame)

        return [
            Peer("imagecodecs, loop by hand, 2 threads", lambda: run(2)),
            Peer("imagecodecs alone: its codec, 1 thread", alone, checked=False),
        ]


def _stored_type(dataset: pydicom.Dataset) -> str:
    return ("i" if dataset.PixelRepresentation else "u") + str(dataset.BitsAllocated // 8)


def _gdcm(folder: Path) -> Array:
    import gdcm

    out: Array | None = None
    ordered = in_slice_order(folder)
    for k, path in enumerate(ordered):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        if not reader.Read():
            raise ValueError(f"GDCM does not read {path.name}")
        image = reader.GetImage()
        kind = image.GetPixelFormat()
        columns, rows = image.GetDimension(0), image.GetDimension(1)
        if out is None:
            out = numpy.empty((len(ordered), rows, columns), numpy.float32)
        # Its Python text carries bytes, one in each surrogate.
        held = image.GetBuffer().encode("utf-8", "surrogateescape")
        name = ("i" if kind.GetPixelRepresentation() else "u") + str(kind.GetBitsAllocated() // 8)
        stored = numpy.frombuffer(held, name).reshape(rows, columns)
        numpy.multiply(stored, numpy.float32(image.GetSlope()), out=out[k])
        out[k] += numpy.float32(image.GetIntercept())
    if out is None:
        raise ValueError("an empty folder")
    return out


def _dcm2niix(folder: Path) -> list[Peer]:
    import nibabel

    program = shutil.which("dcm2niix")
    if program is None:
        return []

    def run() -> Array:
        with tempfile.TemporaryDirectory() as target:
            command = [
                program,
                "-b",
                "n",
                "-z",
                "n",
                "-m",
                "o",
                "-f",
                "x",
                "-o",
                target,
                str(folder),
            ]
            subprocess.run(command, check=True, capture_output=True)
            (file,) = Path(target).glob("*.nii")
            values = nibabel.load(file).get_fdata(dtype=numpy.float32)  # type: ignore[attr-defined]
            # Its rows run from the bottom, as LPS is RAS with two axes turned.
            return numpy.ascontiguousarray(values.transpose(2, 1, 0)[:, ::-1])

    return [Peer("dcm2niix, whole program, to .nii and back", run)]
