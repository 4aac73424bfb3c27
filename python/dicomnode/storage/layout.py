"""Where things lie below the root of a node, and how a file is known to be what it was."""

import itertools
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from dicomnode.lib.dicom import digest, safe_name
from dicomnode.storage.instances import Buffer, flush_folder, make_folder

#: The node's own folder: ledger, outbox, incoming and damaged files. No identifier has this name.
OWN = ".dicomnode"
#: Where files of images begin: those without names, and those with names ahead.
INCOMING = f"{OWN}/incoming"

#: What `safe_name` makes, and a number where that is taken.
OURS = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9._%~-]*")

#: Bytes of a digest: SHA-256, or BLAKE3 cut to 16 bytes, which takes a fifth of the time. A digest tells
#: by its length which one it is.
SHA256: Final = 32
BLAKE3: Final = 16

#: In a folder of results: the folder of the case that they are of.
OWNER = "case"


# Asked for with each image.
@lru_cache(maxsize=1024)
def input_folder(case_folder: str, input_name: str) -> str:
    """The folder of an input's images, relative to the root."""
    return f"{case_folder}/{safe_name(input_name)}"


def outbox_folder(case_id: int) -> str:
    """The folder of a case's results, relative to the root."""
    return f"{OWN}/outbox/{case_id}"


def set_aside(root: Path, relative: Path) -> None:
    """Move a file to the folder of damaged files; never over another one.

    Raises OSError where that cannot be done; then the file is where it was.
    """
    if not (root / relative).exists():
        return
    target = root / OWN / "damaged" / relative
    for number in itertools.count(1):
        candidate = target if number == 1 else target.with_name(f"{target.name}~{number}")
        if not candidate.exists():
            make_folder(candidate.parent)
            (root / relative).rename(candidate)
            flush_folder(candidate.parent)
            return


def digest_of(dataset: Buffer, size: int = SHA256) -> bytes:
    """The digest of a dataset's bytes as they were received."""
    return digest(dataset, size)


def digest_of_file(path: str | Path, size: int = SHA256) -> bytes:
    """The digest of the dataset in a file of ours; empty (unknown) for any other form.

    Raises OSError.
    """
    with Path(path).open("rb") as file:
        start = file.read(144)
        if start[128:132] != b"DICM" or start[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
            return b""
    return digest(str(path), size, 144 + int.from_bytes(start[140:144], "little"))
