"""Do time and memory grow with the number of instances, and with nothing else?

The loop over dicomsdl opens all files before it orders them, which a system allows for so many only.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks import grind_files
from benchmarks.series import reference_volume, same_volume
from benchmarks.timing import Peer, Row, Table

TITLE = "Many small instances from files to float32"
EXTRA = ("us/instance", "peak kB/instance")

reference = reference_volume
same = same_volume
_ASKED = ("dicomnode volume_grinder(load(folder))", "dicomnode volume_grinder(datasets)",
          "dicomsdl, loop by hand")  # fmt: skip


def peers(folder: Path) -> list[Peer]:
    """Ours first."""
    return [peer for peer in grind_files.peers(folder) if peer.name in _ASKED]


def together(tables: Mapping[int, Table]) -> Table:
    """The tables for several numbers of instances as one; in each row what one instance costs."""
    rows = []
    names = [row.name for row in next(iter(tables.values())).rows]
    for name in names:
        for count, table in tables.items():
            (row,) = [row for row in table.rows if row.name == name]
            extra = ("", "")
            if row.seconds:
                peak = "" if row.peak_mb is None else f"{row.peak_mb * 1024 / count:.1f}"
                extra = (f"{row.median * 1e6 / count:.1f}", peak)
            rows.append(
                Row(f"{count} instances, {name}", row.seconds, row.peak_mb, extra, row.wrong)
            )
    return Table(TITLE, tuple(rows), EXTRA)
