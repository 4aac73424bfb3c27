"""`dicomnode run`: from a file that a user wrote to a node that is open."""

import inspect
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from dicomnode.cli.edge import CommandFailed
from dicomnode.errors import DicomnodeError
from dicomnode.server.node import AbstractPipeline


def run_pipeline(where: str, settings: Mapping[str, Any]) -> None:
    """Open the pipeline of `FILE.py[:Class]` and block until it is stopped.

    `settings` replace attributes of the class; None leaves one as it is.
    """
    path, name = _split(where)
    if not path.is_file():
        raise CommandFailed(f"no such file: {path}")
    with _stopping_on_sigterm(), _folder_on_path(path):
        kind = _pipeline_of(_load(path), path, name)
        with _blaming(path):
            node = kind(start=False)
            for attribute, value in settings.items():
                if value is not None:
                    setattr(node, attribute, value)
            try:
                node.open(blocking=True)
            finally:
                node.close()


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """A SIGTERM ends this process in good order also before the node blocks, and after."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _split(where: str) -> tuple[Path, str]:
    """`FILE.py:Class` as a path and a name, which is empty where none is given."""
    file, colon, name = where.rpartition(":")
    if colon and name.isidentifier() and not Path(where).exists():
        return Path(file), name
    return Path(where), ""


@contextmanager
def _folder_on_path(path: Path) -> Iterator[None]:
    """As `python FILE.py` does: modules beside the file can be imported, in process() too."""
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
    with _blaming(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """An exception out of the user's code is told with the line of the user's file."""
    try:
        yield
    except DicomnodeError:
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
        where = lines[-1] if lines else f"{path}: "
        raise CommandFailed(f"{where}{type(error).__name__}: {error}") from error


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
        raise CommandFailed(f"{path} defines no subclass of AbstractPipeline")
    if len(here) > 1:
        raise CommandFailed(
            f"{path} defines several pipelines: {known}; choose one, as in {path}:{next(iter(here))}"
        )
    return next(iter(here.values()))
