"""dicomnode: turn a Python function on images into a DICOM node.

Importing this package starts nothing and loads nothing heavy. The places to look at first:

- `dicomnode.server.node.AbstractPipeline`: the node that you subclass
- `dicomnode.server.input.AbstractInput`: what the node waits for
- `dicomnode.lib.grinders`: from datasets to arrays
- `dicomnode.lib.dimse.Address`: where results go
"""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dicomnode._core import __version__

        return __version__
    raise AttributeError(f"module 'dicomnode' has no attribute {name!r}")
