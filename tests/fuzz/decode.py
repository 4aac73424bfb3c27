"""Mutated objects through the whole way from bytes to an array: an array or our error, in a moment.

`make fuzz` runs it with atheris, whose engine sees which branches of dicomnode's Python code an
input reaches; what it reaches in the compiled core is seen by the Rust targets only. A test runs
it with a mutator of our own, for seconds.
"""

import logging
import random
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

_MOMENT = 2.0


def decode(data: bytes) -> None:
    """Grind one object in both ways. Raises whatever is not an error of dicomnode."""
    from dicomnode.errors import DicomnodeError
    from dicomnode.lib.dicom import LazyDataset
    from dicomnode.lib.grinders import numpy_grinder, volume_grinder

    # Of this process: how busy the machine is with others does not count.
    start = time.process_time()
    for grind in (numpy_grinder(order="given"), volume_grinder()):
        with suppress(DicomnodeError):
            grind([LazyDataset(data)])
    took = time.process_time() - start
    if took > _MOMENT:
        raise TimeoutError(f"{took:.1f} s")


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, dropped or put in, mostly in a header; or cut off."""
    mutated = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not mutated:
            break
        at = chance.randrange(min(len(mutated), chance.choice([80, 1500, len(mutated)])))
        kind = chance.randrange(9)
        if kind < 4:
            mutated[at] = chance.randrange(256)
        elif kind < 6:
            mutated[at] ^= 1 << chance.randrange(8)
        elif kind == 6:
            del mutated[at : at + chance.randrange(1, 9)]
        elif kind == 7:
            mutated[at:at] = chance.randbytes(chance.randrange(1, 5))
        else:
            del mutated[at:]
    return bytes(mutated)


def run(seed: int, seconds: float) -> int:
    """Decode mutated objects for some time; how many. Leaves the input of a finding in a file."""
    from tests.fuzz import corpus

    chance, objects = random.Random(seed), list(corpus.objects())
    last = Path(tempfile.gettempdir(), f"dicomnode-fuzz-{seed}.last")
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutate(chance.choice(objects), chance)
        last.write_bytes(data)
        decode(data)
        count += 1
    last.unlink(missing_ok=True)
    return count


if __name__ == "__main__":
    import atheris

    # Notes of one image each would fill the log.
    logging.disable()
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["dicomnode"]):
        import dicomnode.lib.grinders  # noqa: F401

    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
