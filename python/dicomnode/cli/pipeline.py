"""From `FILE.py[:Class]` to the pipeline that a user wrote there."""

import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from dicomnode.cli.edge import CommandFailed
from dicomnode.errors import DicomnodeError
from dicomnode.server.node import AbstractPipeline


@contextmanager
def pipeline_in(where: str) -> Iterator[type[AbstractPipeline]]:
    """The class that `FILE.py[:Class]` names.

    As with `python FILE.py`, modules beside the file can be imported meanwhile, in process() too.
    """
    path, name = _split(where)
    if not path.is_file():
        raise CommandFailed(f"no such file: {path}")
    with _folder_on_path(path):
        yield _pipeline_of(_load(path), path, name)


@contextmanager
def blaming(where: str) -> Iterator[None]:
    """An exception out of the code of `FILE.py[:Class]` is told with the line of that file."""
    path, _ = _split(where)
    try:
        yield
    except (DicomnodeError, CommandFailed):
        raise
    except SyntaxError as error:
        raise CommandFailed(
            f"{error.filename or path}:{error.lineno}: {type(error).__name__}: {error.msg}"
        ) from error
    except Exception as error:
        folder = path.resolve().parent
        lines = [
            f"{frame.filename}:{frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).parent == folder
        ]
        told = lines[-1] if lines else f"{path}: "
        remedy = ""
        if isinstance(error, ModuleNotFoundError):
            remedy = f"; install it for {sys.executable}, or put it beside the file"
        raise CommandFailed(f"{told}{type(error).__name__}: {error}{remedy}") from error


def _split(where: str) -> tuple[Path, str]:
    """`FILE.py:Class` as a path and a name, which is empty where none is given."""
    file, colon, name = where.rpartition(":")
    if colon and name.isidentifier() and not Path(where).exists():
        return Path(file), name
    return Path(where), ""


@contextmanager
def _folder_on_path(path: Path) -> Iterator[None]:
    """Modules beside a file can be imported meanwhile."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _load(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"pipeline_{path.stem}"
    spec = spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise CommandFailed(f"{path} is no Python file: its name has to end in .py")
    module = module_from_spec(spec)
    sys.modules[name] = module
    with blaming(str(path)):
        spec.loader.exec_module(module)
    return module


def _pipeline_of(module: ModuleType, path: Path, name: str) -> type[AbstractPipeline]:
    """The class with that name; without a name the only pipeline that the file defines."""
    here = {
        value.__name__: value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, AbstractPipeline)
        and value.__module__ == module.__name__
    }
    known = ", ".join(here)
    if name:
        found = getattr(module, name, None)
        if inspect.isclass(found) and issubclass(found, AbstractPipeline):
            return found
        raise CommandFailed(
            f"{path} has no pipeline {name}"
            + (f"; it has {known}" if here else "; it defines no subclass of AbstractPipeline")
        )
    if not here:
        raise CommandFailed(
            f"{path} defines no subclass of AbstractPipeline; it has to stand at the top level, above "
            '`if __name__ == "__main__":`'
        )
    if len(here) > 1:
        raise CommandFailed(
            f"{path} defines several pipelines: {known}; choose one, as in {path}:{next(iter(here))}"
        )
    return next(iter(here.values()))
