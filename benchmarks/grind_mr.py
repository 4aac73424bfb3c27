"""The same as `grind_files` on an MR: small slices, so what is done once for each file counts more."""

from benchmarks import grind_files
from benchmarks.series import reference_volume, same_volume

TITLE = "MR from files to float32, rescaled, in slice order"

peers = grind_files.peers
reference = reference_volume
same = same_volume
