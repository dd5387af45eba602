"""Over the wire: base models, data sets, deploy targets and environments."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.node_environments import NodeEnvironmentRead, node_environment_read
from app.api.schemas.previews import LengthsRead, lengths_read
from app.domain.deploy_targets import DeployTargetKind
from app.domain.enums import TrainingType
from app.domain.texts import Language
from app.executor.jobs.row_previews import Preview as RowsPreviewed
from app.executor.jobs.token_lengths import length_warnings
from app.formats.base import Format, Options
from app.registry.base_models.card import BaseModelCard
from app.registry.base_models.findings import Severity, findings
from app.registry.base_models.service import BaseModelFiles, is_unmade
from app.registry.base_models.uploads import Uploaded
from app.registry.datasets.check import Column, columns_of
from app.registry.datasets.mixes import DEFAULT_SEED, MAX_PARTS, MixPart
from app.registry.datasets.row_surveys import RowSurvey
from app.registry.datasets.service import Preview, Validation
from app.registry.environments.service import EnvironmentSource, EnvironmentView
from app.store.tables import BaseModelRow, DatasetRow, DeployTargetRow

_ID = "5b0e4c1e-9f3d-4a59-8f5e-0d6f3f8f2a11"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_SPEC = "channels:\n  - conda-forge\ndependencies:\n  - python>=3.11\n  - pip\n  - pip:\n      - trl==1.16.0\n"
_MAX_TEXT = 10_000
_MAX_SPEC = 64 * 1024


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


# ---- base models ----------------------------------------------------------------------------------------------------


class BaseModelCreate(_Body):
    """A folder under `models/`, or files that were uploaded, to register."""

    name: str = Field(description="Technical name, unique.", examples=["Qwen2.5-1.5B"])
    path: str | None = Field(
        default=None,
        description="Folder, relative to `models/` of DEEPE_HOME. Without it, what was uploaded under the name.",
        examples=["Qwen2.5-1.5B"],
    )
    description: str = Field(default="", max_length=_MAX_TEXT)


class BaseModelFinding(BaseModel):
    """Something about a base model that matters to a training."""

    severity: Severity
    code: str = Field(examples=["base_model_without_tokenizer"])
    detail: str = Field(description="What follows and what helps, in the caller's language.")


class BaseModelDownload(_Body):
    """A model of a hub to download and register."""

    name: str = Field(description="Technical name, unique.", examples=["Qwen2.5-1.5B"])
    repository: str = Field(description="Name on the hub.", examples=["Qwen/Qwen2.5-1.5B"])
    revision: str = Field(default="main", description="Branch, tag or commit.", examples=["main"])
    description: str = Field(default="", max_length=_MAX_TEXT)


class BaseModelFileRead(BaseModel):
    """A file of a base model, or what is there of one that is being uploaded."""

    path: str = Field(description="Relative to the model's folder.", examples=["model.safetensors"])
    size_bytes: int = Field(description="Bytes that are there.", examples=[3087467144])
    complete: bool = Field(description="False: the rest is still to be uploaded.")


class BaseModelFileList(BaseModel):
    """All files of a base model."""

    items: list[BaseModelFileRead]
    registered: bool = Field(description="False: they were uploaded, and `POST /base-models` registers them.")
    size_bytes: int = Field(description="Of all files together.")
    archive_offset: int | None = Field(description="Bytes that are there of an archive that is being uploaded.")


class BaseModelRead(BaseModel):
    """A registered base model."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=["Qwen2.5-1.5B"])
    description: str
    path: str = Field(description="Relative to DEEPE_HOME.", examples=["models/Qwen2.5-1.5B"])
    card: BaseModelCard = Field(
        description="Read from the folder when it was registered, and again by a submit after files changed; "
        "null: it does not say."
    )
    made_on_first_use: bool = Field(
        description="The files are not there yet: a job makes or downloads them before the first training that starts "
        "from it. The card is empty until then."
    )
    findings: dict[TrainingType, list[BaseModelFinding]] = Field(
        description="What follows from the card for a training of each type. A submit refuses for an `error`."
    )
    created_at: datetime


class UnregisteredBaseModels(BaseModel):
    """Folders under `models/` that look like models and have no entry yet."""

    items: list[str] = Field(examples=[["Qwen2.5-7B"]])


def base_model_file(file: Uploaded) -> BaseModelFileRead:
    """Return a file of a base model as callers see it."""
    return BaseModelFileRead(path=file.path, size_bytes=file.size_bytes, complete=file.complete)


def base_model_files(files: BaseModelFiles) -> BaseModelFileList:
    """Return the files of a base model as callers see them."""
    return BaseModelFileList(
        items=[base_model_file(file) for file in files.files],
        registered=files.registered,
        size_bytes=sum(file.size_bytes for file in files.files),
        archive_offset=files.archive_offset,
    )


def base_model_read(row: BaseModelRow, language: Language) -> BaseModelRead:
    """Return the base model as callers see it."""
    card = BaseModelCard.model_validate(row.card)
    return BaseModelRead(
        id=row.id,
        name=row.name,
        description=row.description,
        path=row.path,
        card=card,
        made_on_first_use=is_unmade(row),
        findings={
            one: [
                BaseModelFinding(severity=f.severity, code=f.violation.code, detail=f.violation.detail(language))
                for f in findings(card, one)
                if not is_unmade(row)
            ]
            for one in TrainingType
        },
        created_at=row.created_at,
    )


# ---- data sets ------------------------------------------------------------------------------------------------------


class _DatasetFile(_Body):
    """A file or folder under `datasets/`, and how it is to be read."""

    path: str = Field(
        description="A file, or a folder with exactly one file of rows, relative to `datasets/` of DEEPE_HOME.",
        examples=["faq.jsonl"],
    )
    encoding: str | None = Field(default=None, description="Of a text that is not UTF-8.", examples=["gb18030"])
    delimiter: str | None = Field(default=None, description="Of a table: comma, semicolon, tab or pipe.")
    sheet: str | None = Field(default=None, description="Of a workbook.", examples=["Sheet1"])

    def options(self) -> Options:
        """Return what is said of the file."""
        return Options(self.encoding, self.delimiter, self.sheet)


class DatasetCreate(_DatasetFile):
    """A file or folder under `datasets/` to register."""

    name: str = Field(description="Unique name.", examples=["faq"])
    description: str = Field(default="", max_length=_MAX_TEXT)


class DatasetCheck(_DatasetFile):
    """A file or folder under `datasets/` to check; the name too, if one is given."""

    name: str | None = Field(default=None, examples=["faq"])


class DatasetColumn(BaseModel):
    """A field of the rows; null counts as no value."""

    name: str = Field(examples=["prompt"])
    rows: int = Field(description="Rows with a value.", examples=[512])
    first_missing_line: int | None = Field(description="Null: every row has a value.", examples=[None])


class DatasetArchive(BaseModel):
    """The archive that a folder was unpacked from; every file of it is kept."""

    digest: str = Field(description="sha256 of the archive.", examples=[_SHA256])
    size_bytes: int


class DatasetMixCreate(_Body):
    """A data set to make out of others."""

    name: str = Field(description="Unique name.", examples=["support"])
    parts: list[MixPart] = Field(min_length=1, max_length=MAX_PARTS, examples=[[{"dataset": "faq", "weight": 2}]])
    seed: int = Field(default=DEFAULT_SEED, ge=0, le=2**53, description="Same parts and seed, same rows and order.")
    description: str = Field(default="", max_length=_MAX_TEXT)


class DatasetMixPart(BaseModel):
    """A data set as it was when it went into a mix; it may be gone or renamed since."""

    dataset: str = Field(description="Id.", examples=[_ID])
    name: str = Field(examples=["faq"])
    digest: str = Field(description="sha256 of its JSONL file.", examples=[_SHA256])
    weight: float = Field(examples=[2])
    max_rows: int | None
    rows: int = Field(description="Rows that it had.", examples=[512])
    taken: int = Field(description="Rows of the mix that are its.", examples=[1024])


class DatasetMix(BaseModel):
    """The recipe of a data set that was made out of others."""

    digest: str = Field(description="The same for what makes the same rows in the same order.", examples=[_SHA256])
    seed: int = Field(examples=[DEFAULT_SEED])
    parts: list[DatasetMixPart]
    pictures: int | None = Field(
        default=None, description="In the folder of the mix. Null: no part has files in a folder of its own."
    )


class DatasetSource(BaseModel):
    """The file as it was brought, and how it was read."""

    format: Format
    media_type: str = Field(examples=["text/csv"])
    digest: str = Field(description="sha256 of the file.", examples=[_SHA256])
    size_bytes: int
    encoding: str | None = Field(examples=["utf-8"])
    delimiter: str | None = Field(examples=[";"])
    sheet: str | None
    compression: str | None = Field(description="gzip, zip, tar or tar.gzip.")
    member: str | None = Field(description="The file in an archive, or the member of a JSON object, with the rows.")
    left_out: list[str] = Field(description="Other sheets, members or files; they are not used.")
    archive: DatasetArchive | None
    mix: DatasetMix | None = Field(default=None, description="The data sets that it was made of.")


class DatasetRead(BaseModel):
    """A registered data set."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=["faq"])
    description: str
    path: str = Field(description="Relative to DEEPE_HOME.", examples=["datasets/faq.jsonl"])
    digest: str = Field(description="sha256 of the JSONL file when it was last checked.", examples=[_SHA256])
    source: DatasetSource | None = Field(
        description="Null: scripts read the JSONL file that was brought. Else how its rows were read or mixed."
    )
    rows: int = Field(examples=[512])
    columns: list[str] = Field(
        description="Fields of the rows; those with `first_missing_line` are not in every row.",
        examples=[["prompt", "completion"]],
    )
    column_counts: list[DatasetColumn] = Field(description="How many rows have a value in each column.")
    blank_lines: int = Field(description="Lines without a row; they are left out.", examples=[0])
    size_bytes: int = Field(examples=[81920])
    created_at: datetime


class DatasetValidation(BaseModel):
    """Everything that registering would say."""

    valid: bool
    rows: int | None = Field(description="Null if there is nothing to read.", examples=[512])
    columns: list[str]
    column_counts: list[DatasetColumn]
    blank_lines: int | None
    size_bytes: int | None
    digest: str | None = Field(examples=[_SHA256])
    source: DatasetSource | None
    violation_count: int = Field(description="Of all problems; about a hundred are listed.")
    violations: list[ProblemEntry]


class DatasetPreview(BaseModel):
    """Some rows, as they stand in the file now."""

    items: list[dict[str, Any]] = Field(examples=[[{"prompt": "Who are you?", "completion": "A test."}]])
    offset: int
    total: int = Field(description="Rows of the whole data set.")


class DatasetProfile(BaseModel):
    """How the rows of a data set are written. Percentiles: so many percent have no more."""

    rows: int = Field(examples=[450])
    forms: dict[str, int] = Field(description="How rows are written.", examples=[{"instruction-output": 450}])
    kinds: dict[str, int] = Field(
        description="What rows become; a method says which kinds it learns from.", examples=[{"conversation": 450}]
    )
    roles: dict[str, int] = Field(
        description="Turns of each role in the first rows.", examples=[{"user": 450, "assistant": 450}]
    )
    features: dict[str, int] = Field(
        description="Rows with tools, pictures, a system turn, reasoning, weights.", examples=[{"system": 12}]
    )
    duplicates: int = Field(description="Rows that stand in the file before.", examples=[3])
    estimated_tokens: dict[str, int] | None = Field(
        description="Of a row, without a tokenizer.", examples=[{"p50": 40, "p90": 80, "p99": 120, "p100": 130}]
    )
    lengths: LengthsRead | None = Field(
        description="Tokens as a method and a base model make of the rows. Null: none were named, or the method counts "
        "no tokens."
    )
    turns: dict[str, int] | None = Field(
        description="Turns of a conversation.", examples=[{"p50": 2, "p90": 2, "p99": 4, "p100": 6}]
    )
    scripts: dict[str, float] = Field(
        description="Shares of the letters of the first rows by script.", examples=[{"latin": 0.98, "cjk": 0.02}]
    )
    problem_count: int = Field(description="Rows that no shipped method can read.", examples=[0])
    problems: list[ProblemEntry] = Field(description="The first of them.")
    remarks: list[ProblemEntry] = Field(description="What is left out of the rows or unusual about them.")


def dataset_profile(found: Mapping[str, Any], measured: RowsPreviewed | None, language: Language) -> DatasetProfile:
    """Return a profile as callers see it, with the lengths that a preview has measured."""
    survey = RowSurvey(found)
    lengths = None if measured is None else measured.lengths
    parameters = {} if measured is None else measured.parameters
    told = [] if lengths is None else length_warnings(lengths, parameters)
    members = {name: found[name] for name in DatasetProfile.model_fields if name in found}
    return DatasetProfile(
        **members
        | {
            "lengths": lengths_read(lengths, parameters),
            "problems": problem_entries(survey.row_problems(), language),
            "remarks": problem_entries([*survey.warnings("/dataset"), *told], language),
        }
    )


def dataset_read(row: DatasetRow) -> DatasetRead:
    """Return the data set as callers see it."""
    return DatasetRead(
        id=row.id,
        name=row.name,
        description=row.description,
        path=row.path,
        digest=row.digest,
        source=_source(row.source),
        rows=row.rows,
        columns=row.columns,
        column_counts=_column_counts(columns_of(row.columns, row.rows, row.report)),
        blank_lines=(row.report or {}).get("blank_lines", 0),
        size_bytes=row.size_bytes,
        created_at=row.created_at,
    )


def dataset_validation(validation: Validation, language: Language) -> DatasetValidation:
    """Return what `datasets:validate` answers."""
    found = validation.inspection
    return DatasetValidation(
        valid=not validation.violation_count,
        rows=found and found.report.rows,
        columns=found.report.column_names if found else [],
        column_counts=_column_counts(found.report.columns if found else ()),
        blank_lines=found and found.report.blank_lines,
        size_bytes=found and found.size_bytes,
        digest=found and found.digest,
        source=_source(found.source) if found else None,
        violation_count=validation.violation_count,
        violations=problem_entries(validation.violations, language),
    )


def _source(document: dict[str, Any] | None) -> DatasetSource | None:
    return None if document is None else DatasetSource.model_validate(document)


def _column_counts(columns: Sequence[Column]) -> list[DatasetColumn]:
    return [
        DatasetColumn(name=column.name, rows=column.rows, first_missing_line=column.first_missing) for column in columns
    ]


def dataset_preview(preview: Preview) -> DatasetPreview:
    """Return some rows as callers see them."""
    return DatasetPreview(items=preview.rows, offset=preview.offset, total=preview.total)


# ---- deploy targets -------------------------------------------------------------------------------------------------


class DeployTargetCreate(_Body):
    """A place where online models are served."""

    name: str = Field(description="Unique name; not `custom`.", examples=["gpu-box"])
    kind: DeployTargetKind = Field(description="`custom`: a script of yours deploys to it.")
    url: str = Field(description="Address of the tool's HTTP API.", examples=["http://gpu-box:11434"])
    port: int | None = Field(default=None, ge=1, le=65535, description="If the address has none.", examples=[None])
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Of a `custom` target: arguments for the script besides the contract's. No secrets: everyone can "
        "read them.",
    )
    file: str | None = Field(
        default=None,
        max_length=1000,
        description="Of a `custom` target: script for methods that deploy to it and name none.",
        examples=[None],
    )
    conda_env: str | None = Field(
        default=None, max_length=300, description="Of a `custom` target: environment for `file`.", examples=[None]
    )


class DeployTargetPatch(_Body):
    """What changes of a deploy target (JSON merge patch); its name and its kind stay."""

    url: str = Field(default_factory=str, description="Address of the tool's HTTP API.", examples=["http://box:11434"])
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Of the address given with it, if that has none; else of the address as it is. Null takes it away.",
        examples=[11435],
    )
    settings: dict[str, Any] | None = Field(
        default=None,
        description="Settings to set; one that is null is removed.",
        examples=[{"replicas": 3, "old": None}],
    )
    file: str | None = Field(default=None, max_length=1000, description="Null removes it.", examples=["push.py"])
    conda_env: str | None = Field(default=None, max_length=300, description="Null removes it.", examples=["base"])


class DeployTargetRead(BaseModel):
    """A configured deploy target."""

    id: str = Field(examples=[_ID])
    name: str = Field(examples=["gpu-box"])
    kind: DeployTargetKind
    url: str = Field(examples=["http://gpu-box:11434"])
    settings: dict[str, Any]
    file: str | None = Field(examples=[None])
    conda_env: str | None = Field(examples=[None])
    created_at: datetime


class DeployTargetAnswer(BaseModel):
    """Whether the server of a deploy target answers."""

    usable: bool = Field(description="A deployment can reach it from here; it runs on a node.")
    status: int | None = Field(description="HTTP status of its start page.", examples=[200])
    detail: str = Field(description="In the caller's language.")


def deploy_target_read(row: DeployTargetRow) -> DeployTargetRead:
    """Return the deploy target as callers see it."""
    return DeployTargetRead(
        id=row.id,
        name=row.name,
        kind=DeployTargetKind(row.kind),
        url=row.url,
        settings=row.settings,
        file=row.file,
        conda_env=row.conda_env,
        created_at=row.created_at,
    )


# ---- environments ---------------------------------------------------------------------------------------------------


class EnvironmentCreate(_Body):
    """A conda environment to register by name."""

    name: str = Field(description="As conda knows it.", examples=["trl"])
    spec: str | None = Field(
        default=None,
        max_length=_MAX_SPEC,
        description="Text of an `environment.yml` to build it from; without one it must be on a node already.",
        examples=[_SPEC],
    )


class EnvironmentSpecReplace(_Body):
    """Another spec for an environment."""

    spec: str = Field(max_length=_MAX_SPEC, description="Text of an `environment.yml`.", examples=[_SPEC])


class EnvironmentBuildOptions(_Body):
    """How to build; without a body as the spec says."""

    locked: bool = Field(default=False, description="Install exactly what another node installed for this spec.")
    lock_of: str | None = Field(
        default=None,
        description="That of this node, by id or name; implies `locked`. Default: of the one that built it last.",
        examples=["laptop"],
    )


class EnvironmentRead(BaseModel):
    """A conda environment that stages can name."""

    name: str = Field(examples=["trl"])
    source: EnvironmentSource = Field(description="`discovered`: found on a node, or `base`; there is no entry.")
    spec: str | None = Field(examples=[_SPEC])
    spec_hash: str | None = Field(description="Digest of what the spec installs.", examples=[_SHA256])
    nodes: list[NodeEnvironmentRead]
    created_at: datetime | None
    updated_at: datetime | None


def environment_read(view: EnvironmentView, language: Language) -> EnvironmentRead:
    """Return the environment as callers see it."""
    row = view.row
    return EnvironmentRead(
        name=view.name,
        source=view.source,
        spec=row and row.spec,
        spec_hash=row and row.spec_hash,
        nodes=[node_environment_read(environment, language) for environment in view.nodes],
        created_at=row and row.created_at,
        updated_at=row and row.updated_at,
    )
