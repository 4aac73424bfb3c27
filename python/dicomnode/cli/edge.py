"""The edge of every command: whatever goes wrong inside becomes one line and an exit code."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dicomnode.errors import DicomnodeError


class CommandFailed(Exception):
    """A command cannot do what it was asked for; the message is all that the user sees."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and exit code 1; Ctrl-C into exit code 130."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except BrokenPipeError as error:
        # Whoever read our output, such as `head`, has seen enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error
    except (CommandFailed, DicomnodeError) as error:
        _fail(str(error))
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{name}{error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - the edge of a command
        _fail(f"{type(error).__name__}: {error}")


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Without pydicom's warnings, which quote values of the patient."""
    # Here, since the help has to come at once.
    from dicomnode.lib import quiet

    with warnings.catch_warnings():
        quiet.quiet_pydicom()
        yield


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"dicomnode: {printable(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def printable(text: str) -> str:
    """A text from a file or the network without what would steer a terminal."""
    return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in text)
