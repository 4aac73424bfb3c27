"""Where things lie below the root of a node, and how a file is known to be what it was."""

import hashlib
import itertools
from pathlib import Path

from dicomnode.lib.dicom import safe_name
from dicomnode.storage.instances import Buffer

#: The node's own folder: ledger, outbox, incoming and damaged files. No identifier has this name.
OWN = ".dicomnode"


def input_folder(case_folder: str, input_name: str) -> str:
    """The folder of an input's images, relative to the root."""
    return f"{case_folder}/{safe_name(input_name)}"


def outbox_folder(case_id: int) -> str:
    """The folder of a case's results, relative to the root."""
    return f"{OWN}/outbox/{case_id}"


def set_aside(root: Path, relative: str) -> None:
    """Move a file to the folder of damaged files; never over another one."""
    if not (root / relative).exists():
        return
    target = root / OWN / "damaged" / relative
    for number in itertools.count(1):
        candidate = target if number == 1 else target.with_name(f"{target.name}~{number}")
        if not candidate.exists():
            candidate.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (root / relative).rename(candidate)
            return


def digest_of(dataset: Buffer) -> bytes:
    """The digest of a dataset's bytes as they were received."""
    return hashlib.sha256(dataset).digest()


def digest_of_file(part10: bytes) -> bytes:
    """The digest of the dataset in a file of ours; empty (unknown) for any other form."""
    if part10[128:132] != b"DICM" or part10[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        return b""
    meta_length = int.from_bytes(part10[140:144], "little")
    return digest_of(memoryview(part10)[144 + meta_length :])
