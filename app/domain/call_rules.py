"""What is wrong with how a method calls a stage: pure rules over one stage of a definition."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from app.domain.definition import ConfigTemplate, RunConfig
from app.domain.errors import Violation
from app.domain.placeholders import MalformedTemplate, Placeholder, PlaceholderKind, only_placeholder, parse
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.domain.stage_calls import CONFIG, WorkingDirectory, document_texts

CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".toml")
TAKEN_NAMES = frozenset({"params.json", "preview-request.json", "result.json", "accelerate.yaml"})
"""Files that the folder of an attempt has anyway."""
OWN_VARIABLES = (
    *("DEEPE_*", "AI_PY_REDIS_*", "TRAINING_START_PORT"),
    *("PATH", "HOME", "USER", "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE"),
    *("CONDA_*", "VIRTUAL_ENV", "LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "DYLD_*", "BASH_ENV", "IFS"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_*", "TORCH_ELASTIC_*"),
)
"""Variables that the platform, the loader or the launcher of a group sets."""
MAX_PATTERNS, MAX_PATTERN = 50, 200
"""Of `include`: how many, and how long each."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}", re.ASCII)
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)


def call_violations(config: RunConfig, at: tuple[str, ...], known: Sequence[str]) -> Iterator[Violation]:
    """Yield what is wrong with the call that stands at the pointer `at`; `known` are the platform's placeholders."""
    yield from _module(config, at)
    texts = list(_texts(config, at))
    used: list[Placeholder] = []
    for where, text, alone_in in texts:
        yield from _text(where, text, alone_in, known, config, used)
    if sum(one.kind is PlaceholderKind.OTHERS for one in used) > 1:
        params = {"placeholder": str(Placeholder(PlaceholderKind.OTHERS))}
        yield Violation(pointer(*at, "arguments"), "placeholder_repeated", params)
    if config.config is not None:
        yield from _config(config.config, (*at, "config"))
        is_named = any(one == Placeholder(PlaceholderKind.PLATFORM, CONFIG) for one in used)
        if not is_named and config.working_directory != WorkingDirectory.RUN:
            yield Violation(pointer(*at, "config"), "config_not_named", {})
    yield from _variables(config, (*at, "env"))
    yield from _working_directory(config, (*at, "working_directory"))
    yield from _include(config, (*at, "include"))


def _include(config: RunConfig, at: tuple[str, ...]) -> Iterator[Violation]:
    for number, text in enumerate(config.include or ()):
        parts = text.removeprefix("/").split("/")
        wrong = any(part in ("", ".", "..") for part in parts) or "\\" in text or not text.isprintable()
        if wrong or parts.count("**") > 3 or len(text) > MAX_PATTERN or number >= MAX_PATTERNS:
            params = {"pattern": shown(text), "limit": MAX_PATTERNS}
            yield Violation(pointer(*at, str(number)), "invalid_include", params)


def valid_module(name: str) -> bool:
    """Return whether `python -m` can be given this name."""
    return _MODULE.fullmatch(name) is not None


def _module(config: RunConfig, at: tuple[str, ...]) -> Iterator[Violation]:
    if config.module is None or not config.module.strip():
        return
    if not valid_module(config.module):
        yield Violation(pointer(*at, "module"), "invalid_module", {"value": shown(config.module)})
    if config.file is not None and config.file.strip():
        yield Violation(pointer(*at, "module"), "module_beside_file", {})


def _texts(config: RunConfig, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, str | None]]:
    """Yield each text with placeholders, its path, and where it stands if what is alone there is no longer a text."""
    for place, item in enumerate(config.arguments or ()):
        here = (*at, "arguments", str(place))
        if isinstance(item, str):
            yield here, item, "arguments"
        else:
            yield from (((*here, str(inner)), text, None) for inner, text in enumerate(item))
    if config.config is not None and config.config.content is not None:
        for path, text in document_texts(config.config.content, (*at, "config", "content")):
            yield path, text, "config"
    for name, text in (config.env or {}).items():
        yield (*at, "env", name), text, None


def _text(
    at: tuple[str, ...],
    text: str,
    alone_in: str | None,
    known: Sequence[str],
    config: RunConfig,
    used: list[Placeholder],
) -> Iterator[Violation]:
    here = pointer(*at)
    if "\0" in text or not _is_text(text):
        yield Violation(here, "text_unusable", {})
        return
    try:
        found = [part for part in parse(text) if isinstance(part, Placeholder)]
        whole = only_placeholder(text)
    except MalformedTemplate as error:
        yield Violation(here, "malformed_placeholder", {"text": shown(str(error))})
        return
    used += found
    for one in found:
        alone = whole is not None and (alone_in == "arguments" or (alone_in == "config" and not _is_flag(one)))
        if one.stands_alone and not alone:
            yield Violation(here, "placeholder_not_alone", {"placeholder": str(one)})
        elif one.kind is not PlaceholderKind.PLATFORM or one.name in known:
            continue
        elif one.name != CONFIG:
            listed = ", ".join(f"{{{name}}}" for name in known)
            yield Violation(here, "unknown_placeholder", {"placeholder": str(one), "known": listed})
        elif config.config is None or alone_in == "config":
            yield Violation(here, "placeholder_without_config", {"placeholder": str(one)})


def _config(config: ConfigTemplate, at: tuple[str, ...]) -> Iterator[Violation]:
    if config.name is None or not config.name.strip():
        yield Violation(pointer(*at, "name"), "missing_config_member", {"member": "name"})
    elif not _FILE_NAME.fullmatch(config.name) or not config.name.endswith(CONFIG_SUFFIXES):
        params = {"value": shown(config.name), "known": ", ".join(CONFIG_SUFFIXES)}
        yield Violation(pointer(*at, "name"), "invalid_config_name", params)
    elif config.name in TAKEN_NAMES:
        yield Violation(pointer(*at, "name"), "config_name_taken", {"value": config.name})
    elif config.name.endswith(".toml") and isinstance(config.content, list):
        yield Violation(pointer(*at, "content"), "config_list_in_toml", {})
    elif config.name.endswith(".toml"):
        for path in _nulls(config.content or {}, (*at, "content")):
            yield Violation(pointer(*path), "config_null_in_toml", {})
    if config.content is None:
        yield Violation(pointer(*at, "content"), "missing_config_member", {"member": "content"})


def _nulls(document: object, at: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if document is None:
        yield at
    elif isinstance(document, dict):
        for name, value in document.items():
            yield from _nulls(value, (*at, name))
    elif isinstance(document, list):
        for place, value in enumerate(document):
            yield from _nulls(value, (*at, str(place)))


def _variables(config: RunConfig, at: tuple[str, ...]) -> Iterator[Violation]:
    for name in config.env or {}:
        if not _VARIABLE.fullmatch(name):
            yield Violation(pointer(*at, name), "invalid_variable_name", {"name": shown(name)})
        elif any(fnmatchcase(name, pattern) for pattern in OWN_VARIABLES):
            yield Violation(pointer(*at, name), "variable_of_platform", {"name": name})


def _working_directory(config: RunConfig, at: tuple[str, ...]) -> Iterator[Violation]:
    value = config.working_directory
    if value is None:
        return
    if value not in list(WorkingDirectory):
        params = {"value": shown(value), "known": ", ".join(WorkingDirectory)}
        yield Violation(pointer(*at), "unknown_working_directory", params)
    elif value == WorkingDirectory.METHOD and config.module is not None:
        yield Violation(pointer(*at), "working_directory_without_file", {})


def _is_flag(placeholder: Placeholder) -> bool:
    return placeholder.kind is PlaceholderKind.FLAG


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
