"""From a pipeline in this process to the same pipeline in another one.

A class goes along as the names of its module, its file and itself; plain settings go along as JSON.
The other process imports the class and makes an instance of its own. Nothing is pickled, so what
cannot be imported or is no plain setting does not go along, and that is told.
"""

import functools
import importlib
import operator
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.dimse import Address

_MAIN, _MAIN_THERE = "__main__", "__mp_main__"
# What an instance makes itself, or what goes along in another way.
_OWN = {"logger", "input", "executor", "is_worker"}


def describe(node: Any) -> dict[str, Any]:
    """What `pipeline_of` needs to make the pipeline of a node in another process, as JSON.

    Raises IncorrectlyConfigured for a class that another process cannot import.
    """
    settings: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in vars(node).items():
        if name.startswith("_") or name in _OWN:
            continue
        try:
            settings[name] = _packed(value)
        except TypeError:
            left_out.append(name)
    inputs: dict[str, Any] = {}
    if node.input != type(node).input:
        # Classes of an `__init__` cannot be named: the instance there makes its own.
        with suppress(IncorrectlyConfigured):
            inputs = {name: _reference(kind) for name, kind in node.input.items()}
    return {
        "pipeline": _reference(type(node)),
        "inputs": inputs,
        "settings": settings,
        "left_out": left_out,
        # Files that are run read them at their top level.
        "arguments": list(sys.argv),
        "level": node.logger.getEffectiveLevel(),
    }


def pipeline_of(description: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The pipeline that was described, made here, and which of its attributes it lacks.

    It is not open. Raises whatever importing and making it raises.
    """
    node = _class(description["pipeline"])(start=False)
    for name, value in description["settings"].items():
        setattr(node, name, _unpacked(value))
    if description["inputs"]:
        node.input = {name: _class(one) for name, one in description["inputs"].items()}
    node.is_worker = True
    return node, [name for name in description["left_out"] if name not in vars(node)]


def _reference(kind: type) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    name, file = kind.__module__, getattr(module, "__file__", None)
    found: object = module
    with suppress(AttributeError):
        found = operator.attrgetter(kind.__qualname__.replace("<locals>", "."))(module)
    if found is not kind:
        raise IncorrectlyConfigured(
            f"{kind.__qualname__} cannot be processed in another process, since that one cannot import "
            f"it: define it in a file, at the top level of the module ({name})"
        )
    if name == _MAIN:
        spec = getattr(module, "__spec__", None)
        if spec is not None and not spec.name.endswith(f".{_MAIN}"):
            # `python -m package.module`
            name = spec.name
        elif file is None:
            raise IncorrectlyConfigured(
                f"{kind.__qualname__} cannot be processed in another process: it was typed into an "
                "interpreter; write it into a file"
            )
    path = None if file is None else str(Path(file).resolve())
    return {"module": name, "file": path, "name": kind.__qualname__}


def _class(reference: Mapping[str, Any]) -> Any:
    name, file = reference["name"], reference["file"] or reference["module"]
    try:
        module = _module(reference["module"], reference["file"])
    except ModuleNotFoundError as error:
        raise IncorrectlyConfigured(
            f"{file} cannot be imported by {sys.executable}: {error}; install it there, or put it beside "
            "that file. What the file adds to sys.path it has to add whenever it is imported, not only "
            'below `if __name__ == "__main__":`'
        ) from error
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        raise IncorrectlyConfigured(
            f"{file} defines no {name} when it is imported: define it at the top level, above "
            '`if __name__ == "__main__":`'
        ) from error


def _module(name: str, file: str | None) -> ModuleType:
    """A module that is loaded from that very file; not a second time where it is loaded."""
    for loaded in (name, _MAIN_THERE) if name == _MAIN else (name,):
        module = sys.modules.get(loaded)
        if module is not None and _is_from(module, file):
            return module
    if name != _MAIN:
        try:
            module = importlib.import_module(name)
            if _is_from(module, file):
                return module
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    if file is None:
        raise IncorrectlyConfigured(f"the module {name} cannot be imported in another process")
    as_name = _MAIN_THERE if name == _MAIN else name
    spec = spec_from_file_location(as_name, file)
    if spec is None or spec.loader is None:
        raise IncorrectlyConfigured(f"{file} is no Python file: its name has to end in .py")
    module = module_from_spec(spec)
    sys.modules[as_name] = module
    if name == _MAIN:
        # As the standard library does it: what is kept as `__main__.Model` is found.
        sys.modules[_MAIN] = module
    spec.loader.exec_module(module)
    return module


def _is_from(module: ModuleType, file: str | None) -> bool:
    found = getattr(module, "__file__", None)
    return (None if found is None else str(Path(found).resolve())) == file


def _packed(value: object) -> Any:
    """A plain setting as JSON. Raises TypeError for any other value."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_packed(one) for one in value]
    if type(value) is tuple:
        return {"tuple": [_packed(one) for one in value]}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if type(value) is Address:
        return {"address": [value.ip, value.port, value.ae_title]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _packed(one) for key, one in value.items()}}
    raise TypeError(f"{type(value).__name__} is no plain setting")


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(_unpacked(one) for one in content)
        case "path":
            return Path(content)
        case "address":
            return Address(*content)
        case _:
            return {key: _unpacked(one) for key, one in content.items()}
