"""The same as `grind_files` on a real series: the head phantom of DICOMNODE_TEST_DATA."""

import shutil
from pathlib import Path

from benchmarks import grind_files
from benchmarks.series import reference_volume, same_volume
from dicomnode.lib.dicom import load
from dicomnode.lib.images import read_slices

TITLE = "Real CT from files to float32, rescaled, in slice order"

peers = grind_files.peers
reference = reference_volume
same = same_volume


def copy_images(source: Path, target: Path) -> Path:
    """The images of a folder without its other objects, which most peers cannot tell apart."""
    target.mkdir(parents=True)
    slices, _ = read_slices(load(source))
    for number, item in enumerate(slices):
        path = str(getattr(item.dataset, "source", ""))
        shutil.copyfile(path, target / f"{number:04}.dcm")
    return target
