"""The same as `grind_files` on a PET: every slice has a slope of its own."""

from benchmarks import grind_files
from benchmarks.series import close_volume, reference_volume

TITLE = "PET from files to float32, a slope for each slice, in slice order"

peers = grind_files.peers
reference = reference_volume
same = close_volume
