"""Data sets over the wire."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import ID, MAX_TEXT, SHA256, RequestBody
from app.api.schemas.previews import LengthsRead, lengths_read
from app.domain.texts import Language
from app.domain.values import Value
from app.executor.jobs.row_previews import Preview as RowsPreviewed
from app.executor.jobs.token_lengths import length_warnings
from app.formats.base import Format, Options
from app.registry.datasets.check import Column, columns_of
from app.registry.datasets.mixes import DEFAULT_SEED, MAX_PARTS, MixPart
from app.registry.datasets.row_surveys import RowSurvey
from app.registry.datasets.service import Preview, Validation
from app.store.tables import DatasetRow


class _DatasetFile(RequestBody):
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
    description: str = Field(default="", max_length=MAX_TEXT)


class DatasetCheck(_DatasetFile):
    """A file or folder under `datasets/` to check; the name too, if one is given."""

    name: str | None = Field(default=None, examples=["faq"])


class DatasetColumn(Value):
    """A field of the rows; null counts as no value."""

    name: str = Field(examples=["prompt"])
    rows: int = Field(description="Rows with a value.", examples=[512])
    first_missing_line: int | None = Field(description="Null: every row has a value.", examples=[None])


class DatasetArchive(Value):
    """The archive that a folder was unpacked from; every file of it is kept."""

    digest: str = Field(description="sha256 of the archive.", examples=[SHA256])
    size_bytes: int


class DatasetMixCreate(RequestBody):
    """A data set to make out of others."""

    name: str = Field(description="Unique name.", examples=["support"])
    parts: list[MixPart] = Field(min_length=1, max_length=MAX_PARTS, examples=[[{"dataset": "faq", "weight": 2}]])
    seed: int = Field(default=DEFAULT_SEED, ge=0, le=2**53, description="Same parts and seed, same rows and order.")
    description: str = Field(default="", max_length=MAX_TEXT)


class DatasetMixPart(Value):
    """A data set as it was when it went into a mix; it may be gone or renamed since."""

    dataset: str = Field(description="Id.", examples=[ID])
    name: str = Field(examples=["faq"])
    digest: str = Field(description="sha256 of its JSONL file.", examples=[SHA256])
    weight: float = Field(examples=[2])
    max_rows: int | None
    rows: int = Field(description="Rows that it had.", examples=[512])
    taken: int = Field(description="Rows of the mix that are its.", examples=[1024])


class DatasetMix(Value):
    """The recipe of a data set that was made out of others."""

    digest: str = Field(description="The same for what makes the same rows in the same order.", examples=[SHA256])
    seed: int = Field(examples=[DEFAULT_SEED])
    parts: list[DatasetMixPart]
    pictures: int | None = Field(
        default=None, description="In the folder of the mix. Null: no part has files in a folder of its own."
    )


class DatasetSource(Value):
    """The file as it was brought, and how it was read."""

    format: Format
    media_type: str = Field(examples=["text/csv"])
    digest: str = Field(description="sha256 of the file.", examples=[SHA256])
    size_bytes: int
    encoding: str | None = Field(examples=["utf-8"])
    delimiter: str | None = Field(examples=[";"])
    sheet: str | None
    compression: str | None = Field(description="gzip, zip, tar or tar.gzip.")
    member: str | None = Field(description="The file in an archive, or the member of a JSON object, with the rows.")
    left_out: list[str] = Field(description="Other sheets, members or files; they are not used.")
    archive: DatasetArchive | None
    mix: DatasetMix | None = Field(default=None, description="The data sets that it was made of.")


class DatasetRead(Value):
    """A registered data set."""

    id: str = Field(examples=[ID])
    name: str = Field(examples=["faq"])
    description: str
    path: str = Field(description="Relative to DEEPE_HOME.", examples=["datasets/faq.jsonl"])
    digest: str = Field(description="sha256 of the JSONL file when it was last checked.", examples=[SHA256])
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
    created_by: str = Field(description="Name of the caller that made it; empty: the service itself.", examples=["ada"])
    created_at: datetime


class DatasetValidation(Value):
    """Everything that registering would say."""

    valid: bool
    rows: int | None = Field(description="Null if there is nothing to read.", examples=[512])
    columns: list[str]
    column_counts: list[DatasetColumn]
    blank_lines: int | None
    size_bytes: int | None
    digest: str | None = Field(examples=[SHA256])
    source: DatasetSource | None
    violation_count: int = Field(description="Of all problems; about a hundred are listed.")
    violations: list[ProblemEntry]


class DatasetPreview(Value):
    """Some rows, as they stand in the file now."""

    items: list[dict[str, Any]] = Field(examples=[[{"prompt": "Who are you?", "completion": "A test."}]])
    offset: int
    total: int = Field(description="Rows of the whole data set.")


class DatasetProfile(Value):
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
        created_by=row.created_by,
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
