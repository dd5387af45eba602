"""What single rows of a file become, as JSON can say it: the row as it was read, and its sequences span by span.

A span is a part of a sequence whose tokens have one fate: given or learned, within the limits or beyond them. The
texts of all spans together are what the chat template wrote; of a long span the middle is counted, not shown.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .files import enumerated_lines, parsed_line
from .lengths import LIMITS
from .problems import RowProblem
from .reading import Reader
from .telling import Wanted
from .values import Example

PARAMETERS = (
    *LIMITS,
    "mask_prompt",
    "system_prompt",
    "chat_template",
    "chat_template_kwargs",
    "enable_thinking",
    "pic_relative_path",
)
"""What decides how a row is shown, beside what decides how it is read."""

FIRST_ROWS = 3
SHOWN_SEQUENCES = 8
SHOWN_TOKENS = 1000
SHOWN_CHARACTERS = 16_000

Document = dict[str, Any]
Show = Callable[[Example], Mapping[str, Any]]


def preview(
    path: Path,
    wanted: Wanted | None,
    lines: Sequence[int] | None = None,
    *,
    limit: int = -1,
    show: Show | None = None,
) -> list[Document]:
    """Return what becomes of the rows at these lines, of the first rows without `lines`. Raises `Refused`.

    Without `wanted` rows are shown as they stand in the file. `limit`: rows that are used, if it is positive. `show`
    adds what needs a tokenizer, and may raise `RowProblem`.
    """
    found = {number: {"line": number, "problem": _problem("line_without_row")} for number in lines or ()}
    last = max(found, default=None)
    for place, (number, line) in enumerate(enumerated_lines(path), start=1):
        if (last is None and place > FIRST_ROWS) or (last is not None and number > last):
            break
        if lines is None or number in found:
            raw = parsed_line(path, number, line)
            left_out = "row_beyond_max_samples" if 0 < limit < place else None
            found[number] = {"line": number, "left_out": left_out, **_row(raw, number, wanted, show)}
            if "sequences" not in found[number]:
                found[number]["raw"] = line.strip()[:SHOWN_CHARACTERS]
                found[number]["raw_characters"] = len(line.strip())
    return [found[number] for number in sorted(found)]


def _row(raw: Any, number: int, wanted: Wanted | None, show: Show | None) -> Document:
    if wanted is None:
        return {}
    reader = Reader(wanted)
    document: Document = {}
    try:
        example = reader.read(raw, number)
        if example is None:
            document["left_out"] = next(iter(reader.report.left_out))
        elif show is not None:
            document |= show(example)
    except RowProblem as problem:
        document["problem"] = _problem(problem.code, problem.pointer, **problem.params)
    document["form"] = next(iter(reader.report.forms), None)
    document["kind"] = next(iter(reader.report.kinds), None)
    document["notes"] = [*map(list, reader.report.said), *([code, ""] for code in document.get("notes", ()))]
    return document


def _problem(code: str, pointer: str = "", **params: Any) -> Document:
    return {"code": code, "pointer": pointer, "params": params}


# ---- spans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What becomes of tokens. `weight`: 1 learned, -1 unlearned (the worse one of two answers), 0 only given."""

    weight: int
    cut: bool = False
    """Beyond a limit."""


@dataclass(frozen=True)
class TokenizedText:
    """A text and its tokens, and where one begins in the other."""

    text: str
    tokens: Sequence[int]
    tokenizer: Any

    def character(self, place: int) -> int:
        """Return where the token at a place begins in the text."""
        if place >= len(self.tokens):
            return len(self.text)
        before = str(
            self.tokenizer.decode(
                list(self.tokens[:place]), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if self.text.startswith(before):
            return len(before)
        if self._offsets is not None:  # inside a character, or the tokenizer has changed the text
            return int(self._offsets[place][0])
        return len(os.path.commonprefix([before, self.text]))

    @cached_property
    def _offsets(self) -> Sequence[tuple[int, int]] | None:
        try:
            encoded = self.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:  # a tokenizer written in Python
            return None
        found: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        return found if list(encoded["input_ids"]) == list(self.tokens) else None


def spans(whole: TokenizedText, start: int, fates: Sequence[Fate]) -> list[Document]:
    """Return the spans of a sequence: the part of `whole` from the token `start` on, with a fate for each token."""
    found = []
    begun = 0
    for place in range(1, len(fates) + 1):
        if place == len(fates) or fates[place] != fates[begun]:
            for first, last, shown in _shown_parts(begun, place):
                found.append(_span(whole, start + first, start + last, fates[begun], shown=shown))
            begun = place
    return found


def _shown_parts(first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the parts of a span, and whether they are shown: of a long one the beginning and the end."""
    if last - first <= SHOWN_TOKENS:
        yield first, last, True
        return
    half = SHOWN_TOKENS // 2
    yield from ((first, first + half, True), (first + half, last - half, False), (last - half, last, True))


def _span(whole: TokenizedText, first: int, last: int, fate: Fate, *, shown: bool) -> Document:
    text = whole.text[whole.character(first) : whole.character(last)]
    return {
        "text": text if shown and len(text) <= SHOWN_CHARACTERS else None,
        "characters": len(text),
        "tokens": last - first,
        "learned": fate.weight != 0,
        "weight": fate.weight,
        "cut": fate.cut,
    }
