"""`dicomnode doctor`: what this installation is made of, and what it can decode."""

import platform
from importlib.metadata import version

import typer

from dicomnode import __version__
from dicomnode.lib.images import codecs, jpeg_has_simd

_HEAD = ("transfer syntax", "name", "decoder", "built from", "licence")
_PARTS = ("pydicom", "pynetdicom", "numpy")


def show_installation() -> None:
    """Versions, then a line for each encapsulated transfer syntax."""
    parts = ", ".join(f"{part} {version(part)}" for part in _PARTS)
    typer.echo(f"dicomnode {__version__}, Python {platform.python_version()}, {parts}")
    typer.echo("")
    rows = [_HEAD, *((*row[:2], row[2] or "not decoded", *row[3:]) for row in codecs())]
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEAD))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
    typer.echo("")
    typer.echo(
        "All of them are compiled in. Native syntaxes (implicit and explicit little endian, explicit "
        "big endian, deflated) need no decoder."
    )
    if not jpeg_has_simd():
        typer.echo(
            "JPEG is decoded without SIMD, several times as slowly: install nasm and build again."
        )
