"""What the product ships: methods, their scripts, helper modules, environments, and samples to try them on.

A preset is one folder: `manifest.toml`, its stage scripts and its samples. What several presets use lies in `shared`.
This module reads and checks them. A method's `definition` is a plain dict in the wire shape, so that the rules of the
registry judge it like any other.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from app.domain.enums import Platform
from app.domain.library_options import OptionTable
from app.domain.texts import DEFAULT_LANGUAGE, Language
from app.domain.values import Value

ROOM = Path(__file__).parent
SHARED = ROOM / "shared"
OLLAMA_SCRIPT = "deploy_ollama.py"
"""Deploys to every configured target; no manifest names it."""

Texts = dict[Language, str]


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterInfo(_Frozen):
    """What a form shows for a parameter; a value outside the typical range deserves a warning, not a refusal."""

    name: str
    label: Texts = {}
    help: Texts = {}
    minimum: float | None = None
    maximum: float | None = None
    values: tuple[str, ...] = ()
    """What people usually take, where the library decides what there is."""


class AlsoLearned(_Frozen):
    """Kinds of examples that are learned as well when a parameter has a value."""

    parameter: str
    value: Any
    learns_from: tuple[str, ...]


class DataRules(_Frozen):
    """What a method learns from: kinds of examples, in the words of the reader of rows (`deepe_rows`)."""

    learns_from: tuple[str, ...]
    also: tuple[AlsoLearned, ...] = ()
    tools: bool = True
    pictures: bool = False
    columns: tuple[str, str] | None = None
    """Names of the columns with input and output that the script takes by default; None: it knows many forms."""
    encoded_by_helpers: bool = False
    """The script writes rows as tokens with `deepe_examples`, so that a preview shows exactly what it learns."""

    def kinds(self, parameters: Mapping[str, Any]) -> frozenset[str]:
        """Return the kinds that are learned with these parameters."""
        more = [one.learns_from for one in self.also if parameters.get(one.parameter) == one.value]
        return frozenset(self.learns_from).union(*more)


class DemoRun(_Frozen):
    """A run that shows the method at work with what is shipped."""

    base_model: str
    dataset: str
    parameters: dict[str, Any] = {}
    questions: tuple[str, ...] = ()
    pictures: tuple[tuple[str, ...], ...] = ()
    """Names of the drawn pictures that each question is about."""
    environments_without_cuda: dict[str, str] = {}
    """Environments that stages of the run take instead of the method's own where there is no NVIDIA GPU, by stage."""

    @model_validator(mode="after")
    def _pictures_of_questions(self) -> Self:
        if self.pictures and len(self.pictures) != len(self.questions):
            raise ValueError("pictures has one list for each question, or nothing")
        return self

    def asked(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return each question with the pictures that it is about."""
        return list(zip(self.questions, self.pictures or [()] * len(self.questions), strict=True))


class PresetManifest(_Frozen):
    """A shipped method. A higher `version` is an upgrade for who has not changed it."""

    name: str
    folder: Path
    version: int = Field(ge=1)
    memory: Literal["sft", "preferences", "grpo", "ppo", "full", "embedding", "reward", "reranking"] | None = None
    """How the training uses its parameters (`deepe_memory.step_of`). None: its memory is not forecast."""
    platforms: tuple[Platform, ...]
    read_only: bool
    by_default: bool | tuple[Platform, ...] = True
    """Whether an installation of one of the platforms has it from the start, or of which; else it comes by name."""
    description: Texts
    definition: dict[str, Any]
    needs_weights: bool = True
    """The training loads the base model's weights. False: a `config.json` alone is enough."""
    data: DataRules
    demo: DemoRun
    parameters: tuple[ParameterInfo, ...]

    @property
    def default_platforms(self) -> frozenset[Platform]:
        """Platforms whose installations have the method from the start."""
        if isinstance(self.by_default, bool):
            return frozenset(self.platforms if self.by_default else ())
        return frozenset(self.by_default)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all script files that the method's stages run, each once."""
        stages = [*self.definition.get("stages", {}).values(), self.definition.get("deployment", {})]
        return tuple(dict.fromkeys(stage["file"] for stage in stages if "file" in stage))


class SampleDataset(_Frozen):
    """A data set for demo runs: a JSONL file, and the pictures that its rows name, which are drawn where it is used."""

    name: str
    path: Path
    description: Texts
    with_pictures: bool = False

    @property
    def digest(self) -> str:
        """Sha256 of the rows."""
        return _shipped_digest(self.path)


class SampleBaseModel(_Frozen):
    """A base model for demo runs: a folder that is shipped, or a program that builds one.

    A program is run as `python <program> <arguments> --output <folder>` by the interpreter of `environment`.
    """

    name: str
    description: Texts
    folder: Path | None = None
    program: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    version: int = 1
    """Raise it when a changed program makes other weights."""

    @property
    def digest(self) -> str:
        """Sha256 of what decides on the files: those of the folder, or how the program is called."""
        if self.folder is not None:
            return _shipped_digest(self.folder)
        assert self.program is not None
        recipe = [self.version, self.program.name, *self.arguments, self.environment]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.folder is None) == (self.program is None) or (self.program is None) != (self.environment is None):
            raise ValueError("a base model has either a folder, or a program with its environment")
        return self


@cache
def load_manifests() -> tuple[PresetManifest, ...]:
    """Return every shipped method, by name."""
    presets = ((folder, raw) for folder, raw in _documents() if folder != SHARED)
    return tuple(sorted((_manifest(folder, raw) for folder, raw in presets), key=lambda manifest: manifest.name))


@cache
def stage_scripts() -> Mapping[str, Path]:
    """Return every shipped stage script by its name: that of the preset's own folder, else the shared one."""
    named = {name: manifest.folder / name for manifest in load_manifests() for name in manifest.files}
    found = {name: own if own.is_file() else SHARED / name for name, own in named.items()}
    return MappingProxyType({**found, OLLAMA_SCRIPT: SHARED / OLLAMA_SCRIPT})


def script_path(name: str) -> Path:
    """Return the shipped stage script of this name; `KeyError` if there is none."""
    return stage_scripts()[name]


def helpers_dir() -> Path:
    """Return the folder with the helper modules (`deepe`, `enums`, ...), for every stage's PYTHONPATH."""
    return SHARED / "helpers"


def download_program() -> Path:
    """Return the program that downloads a model from a hub."""
    return SHARED / "download_model.py"


def preview_program() -> Path:
    """Return the program that shows what a training would learn of rows, for the interpreter of its environment."""
    return SHARED / "preview.py"


def fields_program() -> Path:
    """Return the program that describes configuration classes, for the interpreter of an environment."""
    return helpers_dir() / "deepe_fields.py"


@cache
def option_table() -> OptionTable:
    """Return which fields of configuration classes no method takes, or chooses by itself."""
    document = tomllib.loads((helpers_dir() / "deepe_options.toml").read_text("utf-8"))
    refused = {
        name: (reason, instead) for reason, names in document["refused"].items() for name, instead in names.items()
    }
    return OptionTable(refused=refused, chosen=frozenset(document["chosen"]))


def environment_specs() -> dict[str, Path]:
    """Return the `environment.yml` of each environment that the shipped methods need, by name."""
    return {file.stem: file for file in sorted((SHARED / "environments").glob("*.yml"))}


@cache
def sample_datasets() -> tuple[SampleDataset, ...]:
    return tuple(
        SampleDataset(
            name=name,
            path=folder / entry["file"],
            description=entry["description"],
            with_pictures=entry.get("with_pictures", False),
        )
        for folder, name, entry in _samples("datasets")
    )


@cache
def sample_base_models() -> tuple[SampleBaseModel, ...]:
    return tuple(
        SampleBaseModel(
            name=name,
            description=entry["description"],
            folder=folder / entry["folder"] if "folder" in entry else None,
            program=folder / entry["program"] if "program" in entry else None,
            arguments=tuple(entry.get("arguments", ())),
            environment=entry.get("environment"),
            version=entry.get("version", 1),
        )
        for folder, name, entry in _samples("base_models")
    )


def samples_of(manifest: PresetManifest) -> tuple[SampleDataset, SampleBaseModel]:
    """Return the data set and the base model of a shipped method's demo run."""
    return sample_dataset(manifest.demo.dataset), sample_base_model(manifest.demo.base_model)


def sample_dataset(name: str) -> SampleDataset:
    """Return the sample data set of this name; `KeyError` if there is none."""
    return {sample.name: sample for sample in sample_datasets()}[name]


def sample_base_model(name: str) -> SampleBaseModel:
    """Return the sample base model of this name; `KeyError` if there is none."""
    return {sample.name: sample for sample in sample_base_models()}[name]


def folder_digest(folder: Path) -> str:
    """Return the sha256 of the names and bytes of all files in a folder. Blocks."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{file.relative_to(folder).as_posix()}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


@cache
def shared_parameters() -> dict[str, ParameterInfo]:
    """Return labels, help and typical ranges of the parameters that our scripts add to the platform's."""
    entries = tomllib.loads((SHARED / "parameters.toml").read_text("utf-8"))
    return {name: ParameterInfo(name=name, **entry) for name, entry in entries.items()}


@cache
def shipped_digests() -> frozenset[str]:
    """Return the sha256 of every Python file that the product ships for stages."""
    return frozenset(_file_digest(path) for path in ROOM.rglob("*.py"))


@cache
def _shipped_digest(path: Path) -> str:
    """Return the sha256 of a shipped file or folder; it does not change while the process runs."""
    return folder_digest(path) if path.is_dir() else _file_digest(path)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _documents() -> tuple[tuple[Path, dict[str, Any]], ...]:
    """Return the folder and the content of each manifest, that of the shared samples last."""
    files = (*sorted(ROOM.glob("*/manifest.toml")), SHARED / "samples.toml")
    return tuple((file.parent, tomllib.loads(file.read_text("utf-8"))) for file in files)


def _manifest(folder: Path, raw: Mapping[str, Any]) -> PresetManifest:
    own = raw.get("parameters", {})
    rest = {name: raw[name] for name in raw if name not in ("parameters", "datasets", "base_models")}
    definition = {"name": raw["name"], "description": raw["description"][DEFAULT_LANGUAGE], **raw["definition"]}
    return PresetManifest(**rest | {"folder": folder, "definition": definition, "parameters": _with_shared(own)})


def _with_shared(own: dict[str, dict[str, Any]]) -> tuple[ParameterInfo, ...]:
    """Join the shared texts with what the manifest says itself; the manifest wins field by field."""
    shared = {name: info.model_dump(exclude_unset=True) for name, info in shared_parameters().items()}
    names = sorted(shared.keys() | own.keys())
    return tuple(ParameterInfo(**({"name": name} | shared.get(name, {}) | own.get(name, {}))) for name in names)


def _samples(kind: str) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Yield the folder, the name and the entry of each sample of a kind, the shared ones last."""
    for folder, document in _documents():
        for name, entry in document.get(kind, {}).items():
            yield folder, name, entry
