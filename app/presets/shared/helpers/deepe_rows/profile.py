"""A profile of a file's rows: how they are written, how long they are, what stands twice, in which scripts.

As a program it prints the profile of a file as JSON:

    python -m deepe_rows.profile rows.jsonl
"""

import json
import sys
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unicodedata import name as character_name

from .files import enumerated_rows
from .forms import KINDS
from .problems import Refused
from .survey import SAMPLED_ROWS, Survey, estimated_tokens, texts_of
from .telling import Wanted
from .values import Conversation

MOST_DIGESTS = 4_000_000
"""Rows whose digest is remembered; later ones are not looked at for duplicates."""

LISTED_SCRIPTS = 8
PERCENTILES = (50, 90, 99, 100)


class Profile:
    """Sees each row once. Memory: 8 bytes and a place in a set for each row, up to `MOST_DIGESTS`."""

    def __init__(self) -> None:
        self._survey = Survey(Wanted(kinds=frozenset(KINDS), pictures=True))
        self._digests: set[int] = set()
        self._duplicates = 0
        self._tokens: Counter[int] = Counter()
        self._turns: Counter[int] = Counter()
        self._scripts: Counter[str] = Counter()
        self._rows = 0

    def see(self, raw: Any, line: int) -> None:
        """Look at a row."""
        self._rows += 1
        self._look_for_twin(raw)
        example = self._survey.see(raw, line)
        if example is None:
            return
        texts = list(texts_of(example))
        self._tokens[_rounded(sum(map(estimated_tokens, texts)))] += 1
        if isinstance(example, Conversation):
            self._turns[len(example.turns)] += 1
        if self._rows <= SAMPLED_ROWS:
            for text in texts:
                self._scripts.update(map(_script, filter(str.isalpha, text)))

    def document(self) -> dict[str, Any]:
        """Return the profile, as JSON can say it."""
        found = self._survey.document()
        letters = sum(self._scripts.values())
        return {
            "rows": self._rows,
            "forms": found["forms"],
            "kinds": found["kinds"],
            "roles": found["roles"],
            "features": found["features"],
            "duplicates": self._duplicates,
            "duplicates_of_first": min(self._rows, MOST_DIGESTS),
            "estimated_tokens": percentiles(self._tokens),
            "turns": percentiles(self._turns),
            "scripts": {name: round(count / letters, 3) for name, count in self._scripts.most_common(LISTED_SCRIPTS)},
            "left_out": found["left_out"],
            "said": found["said"],
            "problems": found["problems"],
            "problem_count": found["problem_count"],
        }

    def _look_for_twin(self, raw: Any) -> None:
        if len(self._digests) >= MOST_DIGESTS:
            return
        written = json.dumps(raw, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        digest = int.from_bytes(blake2b(written, digest_size=8).digest(), "big")
        if digest in self._digests:
            self._duplicates += 1
        self._digests.add(digest)


def profile(path: Path) -> dict[str, Any]:
    """Return the profile of a file. Raises `Refused` when it cannot be read."""
    found = Profile()
    for number, raw in enumerated_rows(path):
        found.see(raw, number)
    return found.document()


def percentiles(counts: Counter[int]) -> dict[str, int] | None:
    """Return the values that so many percent of what was counted do not exceed; None for nothing."""
    total = counts.total()
    if not total:
        return None
    found: dict[str, int] = {}
    seen, wanted = 0, list(PERCENTILES)
    for value in sorted(counts):
        seen += counts[value]
        while wanted and seen * 100 >= wanted[0] * total:
            found[f"p{wanted.pop(0)}"] = value
    return found


def _rounded(tokens: float) -> int:
    """Return a number with two digits that count, so that few different ones are kept."""
    return int(float(f"{tokens:.2g}"))


def _script(letter: str) -> str:
    """Return the script that a letter belongs to, the first word of its name: latin, cjk, cyrillic, ..."""
    return "latin" if letter.isascii() else character_name(letter, "other").partition(" ")[0].lower()


def main() -> None:
    try:
        found = profile(Path(sys.argv[1]))
    except Refused as error:
        found = {"refused": str(error)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
