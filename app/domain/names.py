"""Names: what a person may call a thing, when two names are the same, and what the models of a job are called."""

import re
import unicodedata
from collections.abc import Collection
from datetime import UTC, datetime
from uuid import UUID

from app.domain.errors import Violation
from app.domain.plain_text import shown

MAX_NAME_LENGTH = 100
MAX_TECHNIQUE_LENGTH = 40
NO_QUANTIZATION = "no_quantization"
BASE_ENVIRONMENT = "base"
"""The environment that is always known: conda's root prefix, else one that the node builds."""

_PUNCTUATION = frozenset(" ._-")
_UUID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def normal_name(name: str) -> str:
    """Return `name` in Unicode normal form C, the form in which names are kept and counted."""
    return unicodedata.normalize("NFC", name)


def name_key(name: str) -> str:
    """Return what makes a name unique: two names with one key are the same name."""
    return normal_name(normal_name(name).casefold())


def name_violations(
    name: str | None,
    pointer: str = "/name",
    *,
    reserved: Collection[str] = (),
    max_length: int = MAX_NAME_LENGTH,
) -> list[Violation]:
    """Return what is wrong with the name of a resource; `reserved` names are taken by the product."""
    if name is None or not name.strip():
        return [Violation(pointer, "missing_name")]
    name = normal_name(name)
    found = []
    if len(name) > max_length:
        found.append(Violation(pointer, "name_too_long", {"length": len(name), "limit": max_length}))
    if forbidden := _forbidden_characters(name.strip(" ")):
        found.append(Violation(pointer, "invalid_name", {"characters": " ".join(forbidden)}))
    elif not any(character.isalnum() for character in name):
        # "." and ".." would vanish from a URL's path
        found.append(Violation(pointer, "name_without_letters"))
    if name != name.strip(" "):
        found.append(Violation(pointer, "name_has_outer_space"))
    if _UUID.fullmatch(name):
        # a URL takes a name or an id, so that a name must not look like an id
        found.append(Violation(pointer, "name_looks_like_id"))
    if name_key(name) in {name_key(word) for word in reserved}:
        found.append(Violation(pointer, "name_reserved", {"name": name}))
    return found


def environment_name_violations(name: str, pointer: str) -> list[Violation]:
    """Return what is wrong with the name of a conda environment (conda's own rules: no spaces, slashes, colons)."""
    if not name.strip():
        return [Violation(pointer, "missing_name")]
    if not _ENVIRONMENT.fullmatch(name):
        return [Violation(pointer, "invalid_environment_name", {"name": shown(name)})]
    return []


def is_label(value: str) -> bool:
    """Whether `value` can be a technique: short, and made of what names are made of."""
    return len(value) <= MAX_TECHNIQUE_LENGTH and not name_violations(value)


def produced_name(*, technical_name: str, train_name: str, produced_at: datetime, job_id: UUID) -> str:
    """Return the name of the first model of a chain: `<technical>_<train name>_<YYYYMMDD>_<4 of the job's id>`.

    That is the customized model, or the complete one on a path without customized. The date is the day in UTC.
    """
    day = produced_at.astimezone(UTC).strftime("%Y%m%d")
    return f"{_part(technical_name)}_{_part(train_name)}_{day}_{job_id.hex[:4]}"


def complete_name(*, source_name: str, saving_id: UUID) -> str:
    """Return the name of a complete model that was saved from the customized model `source_name`."""
    return f"{source_name}_s_{saving_id.hex[:4]}"


def online_name(*, source_name: str, deployment_id: UUID, quantization: str | None = None) -> str:
    """Return the name of an online model, whatever it was deployed from (complete, customized or base)."""
    return f"{source_name}_d_{deployment_id.hex[:4]}_{quantization or NO_QUANTIZATION}"


def _forbidden_characters(name: str) -> list[str]:
    """Return the characters that no name may have, each once, in a printable form."""
    found: dict[str, None] = {}
    before = ""
    for character in name:
        if not _allowed(character, before):
            found[character if character.isprintable() else f"U+{ord(character):04X}"] = None
        before = character
    return list(found)


def _allowed(character: str, before: str) -> bool:
    kind = unicodedata.category(character)
    if kind.startswith("M"):  # a vowel sign or accent is part of the letter before it
        return bool(before) and unicodedata.category(before)[0] in "LM"
    return kind.startswith("L") or kind == "Nd" or character in _PUNCTUATION


def _part(name: str) -> str:
    """Return `name` fit to stand inside a model's name: what a name may not have, and spaces, become a hyphen."""
    normal = normal_name(name).strip()
    kept = "".join(c if _allowed(c, b) and c != " " else "-" for b, c in zip("x" + normal, normal, strict=False))
    return re.sub("-{2,}", "-", kept).strip("-") or "model"
