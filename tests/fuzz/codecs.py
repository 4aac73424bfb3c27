"""Mutated codestreams of every codec: an error or an image, within a moment, and nothing else.

`make fuzz` runs it for ten minutes, each codec in turn; a test runs it for seconds. A crash of the
process leaves the last input in the file that it names.
"""

import argparse
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy
from tests.unit import test_codecs as known

from dicomnode.errors import DicomnodeError

_MOMENT = 2.0


def corpus() -> list[tuple[str, bytes, tuple[int, int], int]]:
    """(transfer syntax, frame, rows and columns, bits stored), small ones of every codec."""
    made = []
    for syntax, encode, _ in known.LOSSLESS_CODECS.values():
        for cells, stored in known.random_images(False, 8):
            made.append((syntax, encode(cells, stored), cells.shape, stored))
    for syntax, bits, encode, *_ in known.LOSSY.values():
        ramp = numpy.add.outer(numpy.arange(40), numpy.arange(33)) * (1 << bits) / 80
        cells = ramp.astype("u1" if bits == 8 else "<u2")
        made.append((syntax, bytes(encode(cells)), (40, 33), bits))
    return made


def mutate(frame: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, dropped or put in, mostly in the header; or cut off."""
    data = bytearray(frame)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        at = chance.randrange(min(len(data), chance.choice([80, len(data)])))
        kind = chance.randrange(5)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[at : at + chance.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.randrange(1, 5))
        else:
            del data[at:]
    return bytes(data)


def run(seed: int, seconds: float) -> int:
    """Decode mutated frames for some time; how many. Raises for what took longer than a moment."""
    chance, made = random.Random(seed), corpus()
    last = Path(tempfile.gettempdir(), f"dicomnode-fuzz-{seed}.last")
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        syntax, frame, shape, stored = chance.choice(made)
        mutated = mutate(frame, chance)
        last.write_bytes(mutated)
        # Of this process: how busy the machine is with others does not count.
        start = time.process_time()
        with suppress(DicomnodeError):
            known.decode(known.items(mutated), syntax, *shape, stored)
        took = time.process_time() - start
        if took > _MOMENT:
            raise TimeoutError(f"{took:.1f} s for {syntax} {shape} {stored}: {mutated.hex()}")
        count += 1
    last.unlink(missing_ok=True)
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"{run(options.seed, options.seconds)} frames, seed {options.seed}")
