"""Pictures of slices: from values to grey, to a PNG, to a terminal."""

from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image

# From dark to light.
_RAMP = " .:-=+*#%@"


def grey(
    values: NDArray[Any], window: tuple[float, float] | None = None, inverted: bool = False
) -> NDArray[numpy.uint8]:
    """Values as 0..255. `window` are the values of black and white.

    Without it the 1st and 99th percentile are. `inverted` is for MONOCHROME1.
    """
    low, high = numpy.percentile(values, (1, 99)) if window is None else window
    if high <= low:
        low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    shade: NDArray[numpy.uint8] = (
        numpy.rint((values - numpy.float64(low)) / span * 255).clip(0, 255).astype(numpy.uint8)
    )
    return 255 - shade if inverted else shade


def beside(left: NDArray[numpy.uint8], right: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
    """Two grey pictures of the same height with a gap between them."""
    gap = numpy.full((left.shape[0], max(4, left.shape[1] // 64)), 128, numpy.uint8)
    return numpy.hstack([left, gap, right])


def write_png(picture: NDArray[numpy.uint8], path: Path, aspect: float = 1.0) -> None:
    """Write a picture (row, column) or (row, column, RGB).

    `aspect` is the height of a pixel over its width. A small picture is enlarged.
    """
    rows, columns = picture.shape[:2]
    scale = max(1, 384 // max(rows, 1))
    size = (columns * scale, max(1, round(rows * scale * aspect)))
    image = Image.fromarray(picture)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")


def terminal_lines(
    picture: NDArray[numpy.uint8], columns: int, aspect: float = 1.0, colour: bool = False
) -> list[str]:
    """A picture as lines of text, at most so many columns wide.

    A character stands for two pixels, one above the other. With `colour` it is a half block in
    24-bit ANSI colours, else one of a ramp of ASCII characters.
    """
    rows, width = picture.shape[:2]
    columns = min(columns, width)
    lines = max(1, round(columns * rows * aspect / width / 2))
    image = Image.fromarray(picture)
    if not colour:
        small = numpy.asarray(
            image.convert("L").resize((columns, lines), Image.Resampling.BOX), numpy.int64
        )
        return ["".join(_RAMP[shade * len(_RAMP) // 256] for shade in line) for line in small]
    pairs = numpy.asarray(
        image.convert("RGB").resize((columns, 2 * lines), Image.Resampling.BOX)
    ).reshape(lines, 2, columns, 3)
    return ["".join(map(_half_block, upper, lower)) + "\x1b[0m" for upper, lower in pairs]


def _half_block(upper: NDArray[numpy.uint8], lower: NDArray[numpy.uint8]) -> str:
    above, below = ";".join(map(str, upper)), ";".join(map(str, lower))
    return f"\x1b[38;2;{above};48;2;{below}m\N{UPPER HALF BLOCK}"
