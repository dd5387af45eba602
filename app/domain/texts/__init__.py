"""Sentences for people, by stable code, in English, Chinese and German.

One TOML file per area; a table per code: `[name_taken]` with the keys `en`, `zh`, `de`. Placeholders are
`str.format` fields. A code is in exactly one file.
"""

import tomllib
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any


class Language(StrEnum):
    """Languages of every text that a person reads."""

    EN = "en"
    ZH = "zh"
    DE = "de"


DEFAULT_LANGUAGE = Language.EN


def text(code: str, language: Language = DEFAULT_LANGUAGE, /, **params: Any) -> str:
    """Return the sentence of `code`. An unknown code is returned as it is, not raised as a KeyError."""
    entry = catalogue().get(code)
    if entry is None:
        return code
    return entry[language].format_map(_Params(params))


def labels(code: str) -> dict[Language, str]:
    """Return the text of `code` in every language (for forms)."""
    return {language: text(code, language) for language in Language}


@cache
def catalogue() -> dict[str, dict[Language, str]]:
    """Read all areas once; a code defined twice is a programming error."""
    merged: dict[str, dict[Language, str]] = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        for code, entry in tomllib.loads(file.read_text("utf-8")).items():
            if code in merged:
                raise ValueError(f"text {code!r} is defined twice, the second time in {file.name}")
            merged[code] = {Language(key): value for key, value in entry.items()}
    return merged


class _Params(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "{" + key + "}"
