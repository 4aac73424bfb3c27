"""Who a patient is, and texts without it: for logs and messages that quote what user code said.

Solves that the message of an exception, which its author needs, may quote the dataset that it is
about. The values of the patient that are known are taken out; what user code has computed from them
cannot be known.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Final

from dicomnode.errors import InvalidDicom
from dicomnode.lib.dicom import Header, Source, header_element, scan

_HIDDEN: Final = "***"
# AccessionNumber, names of physicians and operators, and what the Patient Module says of who it is.
_TAGS: Final = (
    0x00080050, 0x00080090, 0x00081048, 0x00081050, 0x00081060, 0x00081070, 0x00100010, 0x00100020,
    0x00100030, 0x00100032, 0x00101000, 0x00101001, 0x00101005, 0x00101040, 0x00101060, 0x00102154,
    0x00102297, 0x00321032,
)  # fmt: skip
# Shorter identifiers tell nothing of a patient, and are in every other text.
_SHORTEST_IDENTIFIER = 4
_SHORTEST_NAME = 2
# A longer word is hidden also in the middle of another one.
_LONGEST_WHOLE_WORD = 4


def patient_words(header: Header) -> frozenset[str]:
    """What a header tells of who the patient is, in the spellings that a text may have of it."""
    return frozenset(word for tag in _TAGS for word in _words(header, tag))


def patient_words_of(sources: Iterable[Source]) -> frozenset[str]:
    """The same of many objects; those that cannot be read tell nothing."""
    words: frozenset[str] = frozenset()
    for source in sources:
        try:
            words |= patient_words(scan(source))
        except (InvalidDicom, OSError):
            continue
    return words


def redacted(text: str, words: Iterable[str]) -> str:
    """A text with `***` for each of these words, in upper or lower case."""
    patterns = [_pattern(word) for word in sorted(words, key=len, reverse=True)]
    return re.sub("|".join(patterns), _HIDDEN, text, flags=re.IGNORECASE) if patterns else text


def _pattern(word: str) -> str:
    escaped = re.escape(word)
    if len(word) > _LONGEST_WHOLE_WORD:
        return escaped
    return rf"(?<![^\W_]){escaped}(?![^\W_])"


def _words(header: Header, tag: int) -> set[str]:
    try:
        element = header_element(header, tag)
    except InvalidDicom:
        return set()
    if element is None or element.value is None:
        return set()
    value = element.value
    is_many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    texts = [str(one).strip() for one in (value if is_many else [value])]
    if element.VR == "PN":
        return {
            word
            for text in texts
            for word in (text, text.replace("^", " "), *re.split(r"[\^=\s]+", text))
            if len(word) >= _SHORTEST_NAME
        }
    words = {text for text in texts if len(text) >= _SHORTEST_IDENTIFIER}
    if element.VR == "DA":
        words |= {spelling for text in texts for spelling in _dates(text)}
    return words


def _dates(text: str) -> Iterable[str]:
    try:
        day = date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError:
        return
    for form in (
        "%Y-%m-%d",
        "%Y/%m/%d",
        "%Y.%m.%d",
        "%d-%m-%Y",
        "%d/%m/%Y",
        "%d.%m.%Y",
        "%m/%d/%Y",
    ):
        yield day.strftime(form)
    yield f"datetime.date({day.year}, {day.month}, {day.day})"
