"""What the files of a tokenizer say: its size, its special tokens, its chat template. Blocks; call it in a thread."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.domain.errors import Violation
from app.domain.plain_text import shown, storable
from app.registry.models import tokenizer_reader
from app.registry.models.chat_templates import EOS, turn_end
from app.registry.models.files import MIB, UnusableFile, open_regular, read_json_object, refuse_pointer

CONFIG: Final = "tokenizer_config.json"
FAST: Final = "tokenizer.json"
_OTHERS: Final = (
    "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "tokenizer.model.v3", "vocab.model",
)  # fmt: skip
# their texts are bytes or characters, so that they need no vocabulary
_WITHOUT_FILES: Final = frozenset({"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"})
_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_MAX_JSON_BYTES: Final = 8 * MIB
_MAX_FAST_BYTES: Final = 128 * MIB
_WALL_SECONDS: Final = 60.0
_LONGEST_TOKEN: Final = 1000
_SHOWN: Final = 80
_INHERITED: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


@dataclass(frozen=True)
class Tokenizer:
    """What a model's tokenizer is like; None: its files do not say."""

    present: bool = False
    ids: int | None = None
    """Highest id and one."""
    special: Mapping[str, str] = field(default_factory=dict)
    """The tokens that `tokenizer_config.json` gives a role, such as `eos_token`."""
    unknown: Sequence[str] = ()
    """Those of them that the vocabulary does not have."""
    adds_bos: bool | None = None
    chat_template: bool = False
    template_has_bos: bool | None = None
    turn_end: str | None = None
    """The token that ends an assistant's turn in the chat template."""
    stops: Sequence[str] = ()
    """The tokens at which an answer ends, by `generation_config.json`, else `config.json`, else the tokenizer."""
    problem: Violation | None = None
    """Why its files cannot be used."""


def read_tokenizer(folder: Path, names: frozenset[str], config: Mapping[str, Any]) -> Tokenizer:
    """Return what the tokenizer in `folder` says. `names` are the files that may be read, `config` is the model's."""
    problem: Violation | None = None
    settings: dict[str, Any] = {}
    reading: dict[str, Any] | None = None
    try:
        settings = _settings(folder, names)
    except UnusableFile as exc:
        problem = exc.violation
    special = {role: token for role in _SPECIAL if (token := _token(settings.get(role))) is not None}
    template = _template(folder, names, settings)
    if FAST in names:
        try:
            reading = _read_fast(folder / FAST, sorted(set(special.values())))
        except UnusableFile as exc:
            problem = problem or exc.violation
    ids: Mapping[str, int | None] = reading["wanted"] if reading else {}
    by_id: Mapping[str, str] = reading["names"] if reading else _added(settings)
    eos = special.get("eos_token")
    end = turn_end(template, _special_tokens(reading, settings)) if template else None
    bos = special.get("bos_token")
    return Tokenizer(
        present=_present(names, settings),
        ids=reading["ids"] if reading else None,
        special={role: _shown(token) for role, token in special.items()},
        unknown=[_shown(token) for token in special.values() if reading and ids.get(token) is None],
        adds_bos=_adds_bos(settings, reading, bos),
        chat_template=template is not None,
        template_has_bos=None if template is None or bos is None else "bos_token" in template or bos in template,
        turn_end=_shown(eos) if end == EOS and eos else _shown(end) if end and end != EOS else None,
        stops=[_shown(token) for token in _stops(folder, names, config, by_id, special, ids)],
        problem=problem,
    )


def _settings(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        if name in names:
            settings |= read_json_object(folder / name, max_bytes=_MAX_JSON_BYTES)
    return settings


def _present(names: frozenset[str], settings: Mapping[str, Any]) -> bool:
    """Say whether there is a vocabulary, or a tokenizer that needs none."""
    if FAST in names or not names.isdisjoint(_OTHERS):
        return True
    if any(name.endswith(".tiktoken") or name.startswith("tokenization_") for name in names):
        return True
    kind, code = settings.get("tokenizer_class"), settings.get("auto_map")
    return (isinstance(kind, str) and kind in _WITHOUT_FILES) or (isinstance(code, dict) and "AutoTokenizer" in code)


def _token(value: Any) -> str | None:
    match value:
        case str() | {"content": str()}:
            text = value if isinstance(value, str) else value["content"]
            return text if 0 < len(text) <= _LONGEST_TOKEN else None
        case _:
            return None


def _template(folder: Path, names: frozenset[str], settings: Mapping[str, Any]) -> str | None:
    """Return the chat template that is used by default."""
    if "chat_template.jinja" in names:
        with open_regular(folder / "chat_template.jinja") as stream:
            return stream.read(_MAX_JSON_BYTES).decode("utf-8", "replace") or None
    if "chat_template.json" in names:
        try:
            found = read_json_object(folder / "chat_template.json", max_bytes=_MAX_JSON_BYTES).get("chat_template")
        except UnusableFile:
            found = None
        if isinstance(found, str):
            return found or None
    match settings.get("chat_template"):
        case str(text):
            return text or None
        case [*several]:
            named = {one["name"]: one["template"] for one in several if _is_named(one)}
            return named.get("default") or next(iter(named.values()), None)
        case _:
            return None


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))


def _special_tokens(reading: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> list[str]:
    return list(reading["special"]) if reading else list(_added(settings).values())


def _added(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that `tokenizer_config.json` lists, by their id."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return {}
    return {number: token for number, entry in listed.items() if (token := _token(entry)) is not None}


def _adds_bos(settings: Mapping[str, Any], reading: Mapping[str, Any] | None, bos: str | None) -> bool | None:
    if bos is None:
        return False
    if isinstance(settings.get("add_bos_token"), bool):
        return bool(settings["add_bos_token"])
    return reading["first"] == bos if reading else None


def _stops(
    folder: Path,
    names: frozenset[str],
    config: Mapping[str, Any],
    by_id: Mapping[str, str],
    special: Mapping[str, str],
    ids: Mapping[str, int | None],
) -> list[str]:
    numbers: Any = None
    if "generation_config.json" in names:
        try:
            numbers = read_json_object(folder / "generation_config.json", max_bytes=_MAX_JSON_BYTES).get("eos_token_id")
        except UnusableFile:
            numbers = None
    if numbers is None:
        numbers = config.get("eos_token_id")
    wanted = [number for number in (numbers if isinstance(numbers, list) else [numbers]) if isinstance(number, int)]
    known = {**by_id, **{str(number): token for token, number in ids.items() if number is not None}}
    if not wanted:
        return [special["eos_token"]] if "eos_token" in special else []
    found = [known.get(str(number)) for number in wanted]
    return [token for token in found if token is not None] if all(found) else []


def _read_fast(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Return what `tokenizer_reader` says of the file."""
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size > _MAX_FAST_BYTES:
            raise UnusableFile("model_file_too_large", path, mib=_MAX_FAST_BYTES // MIB)
        refuse_pointer(path, os.pread(stream.fileno(), 64, 0))
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", tokenizer_reader.__file__, json.dumps(wanted)],
                stdin=stream,
                capture_output=True,
                timeout=_WALL_SECONDS,
                check=False,
                env={name: os.environ[name] for name in _INHERITED if name in os.environ},
                start_new_session=True,  # Ctrl-C of a terminal is not for it
            )
        except subprocess.TimeoutExpired as exc:
            raise UnusableFile("tokenizer_unreadable", path) from exc
    if done.returncode != 0:
        raise UnusableFile("tokenizer_unreadable", path)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _shown(token: str) -> str:
    return shown(storable(token), limit=_SHOWN)
