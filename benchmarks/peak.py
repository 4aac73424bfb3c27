"""Peak memory of one peer above what its process had before, in MB: a process of its own.

`python -m benchmarks.peak benchmarks.grind_files NAME FOLDER TINY_FOLDER`
"""

import importlib
import sys
from pathlib import Path

from benchmarks.timing import memory_mb


def main(module: str, name: str, folder: str, tiny: str) -> None:
    """Print the megabytes."""
    question = importlib.import_module(module)
    warm = {peer.name: peer for peer in question.peers(Path(tiny))}
    warm[name].run()
    peer = {peer.name: peer for peer in question.peers(Path(folder))}[name]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = memory_mb("VmRSS")
    result = peer.run()
    print(memory_mb("VmHWM") - start)
    del result


if __name__ == "__main__":
    main(*sys.argv[1:])
