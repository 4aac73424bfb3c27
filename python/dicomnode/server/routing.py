"""Routing: from a header to the case and the inputs that an image belongs to, or why to none.

Pure: no network, no disk, no state. What an input asks for is compiled once, when a node opens, so
that a wrong tag or value is an error before the first image comes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydicom.multival import MultiValue

from dicomnode.errors import IncorrectlyConfigured
from dicomnode.lib.dicom import Header, header_element, identifier_of, tag_name, tag_of
from dicomnode.server.input import AbstractInput


@dataclass(frozen=True)
class Rule:
    """What one input asks of an image."""

    input_name: str
    tags: tuple[int, ...]
    values: tuple[tuple[int, Callable[[Any], bool], str], ...]

    def refusal(self, header: Header) -> str:
        """Why this input does not take the image; empty where it does. Shows no value but CS-like."""
        for tag in self.tags:
            if tag not in header:
                return f"{tag_name(tag)} is missing"
        for tag, accepts, wanted in self.values:
            if tag not in header:
                return f"{tag_name(tag)} is missing, it has to be {wanted}"
            element = header_element(header, tag)
            value = None if element is None else element.value
            if not accepts(value):
                shown = (
                    repr(str(value)) if element is not None and element.VR == "CS" else "another"
                )
                return f"{tag_name(tag)} is {shown}, it has to be {wanted}"
        return ""


class Route(NamedTuple):
    """Where an image goes: its identifier, the inputs that take it, and why the others do not."""

    identifier: str
    accepted: tuple[str, ...]
    refused: dict[str, str]


def compile_rules(inputs: Mapping[str, type[AbstractInput]]) -> tuple[Rule, ...]:
    """The rules of a pipeline's inputs.

    Raises IncorrectlyConfigured for a tag that is none.
    """
    return tuple(_compile(name, kind) for name, kind in inputs.items())


def _compile(name: str, kind: type[AbstractInput]) -> Rule:
    def number(tag: Any, attribute: str) -> int:
        try:
            return tag_of(tag)
        except (ValueError, TypeError, OverflowError) as error:
            raise IncorrectlyConfigured(
                f"input {name!r}: {tag!r} in {attribute} of {kind.__name__} is no DICOM tag; use an "
                "int such as 0x00080060, or a keyword such as 'Modality'"
            ) from error

    try:
        name.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        raise IncorrectlyConfigured(
            f"input {name!r}: the name of an input has to be text that UTF-8 can hold"
        ) from error
    tags, values = kind.required_tags, kind.required_values
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise IncorrectlyConfigured(
            f"input {name!r}: required_tags of {kind.__name__} has to be a list of tags, such as "
            f"['PatientID'], not {tags!r}"
        )
    if not isinstance(values, Mapping):
        raise IncorrectlyConfigured(
            f"input {name!r}: required_values of {kind.__name__} has to map tags to values, such as "
            f"{{'Modality': 'CT'}}, not {values!r}"
        )
    return Rule(
        name,
        tuple(number(tag, "required_tags") for tag in tags),
        tuple(
            (number(tag, "required_values"), *_acceptance(wanted)) for tag, wanted in values.items()
        ),
    )


def _acceptance(wanted: Any) -> tuple[Callable[[Any], bool], str]:
    """A test for a value, and how to say what it asks for."""
    if isinstance(wanted, re.Pattern):
        return lambda value: value is not None and wanted.search(_text(value)) is not None, (
            f"matched by {wanted.pattern!r}"
        )
    if isinstance(wanted, list | tuple | set | frozenset):
        allowed = list(wanted)
        return (
            lambda value: _equals(value, allowed) or any(_equals(value, one) for one in allowed),
            (f"one of {allowed!r}"),
        )
    if callable(wanted):
        name = getattr(wanted, "__name__", repr(wanted))
        return lambda value: bool(wanted(value)), f"accepted by {name}()"
    return lambda value: _equals(value, wanted), repr(wanted)


def _equals(value: Any, wanted: Any) -> bool:
    if isinstance(value, MultiValue):
        value = list(value)
    return bool(value == wanted)


def _text(value: Any) -> str:
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)


def route(
    header: Header, rules: tuple[Rule, ...], identifier_tag: int, identifier: str | None = None
) -> Route:
    """Where the image with this header goes; with `identifier`, where that is known.

    Raises InvalidDicom where an attribute that a rule looks at cannot be understood.
    """
    accepted: list[str] = []
    refused: dict[str, str] = {}
    for rule in rules:
        reason = rule.refusal(header)
        if reason:
            refused[rule.input_name] = reason
        else:
            accepted.append(rule.input_name)
    if identifier is None:
        identifier = identifier_of(header, identifier_tag)
    return Route(identifier, tuple(accepted), refused)
