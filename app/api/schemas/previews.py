"""Previews of rows: what a training would be given and would learn of them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from app.api.errors import ProblemEntry, problem_entries
from app.api.schemas.common import RequestBody
from app.domain.errors import Violation
from app.domain.texts import Language
from app.domain.values import Value
from app.executor.jobs.requests import Parameters
from app.executor.jobs.row_previews import Preview, PreviewRequest
from app.executor.jobs.token_lengths import length_warnings
from app.presets.shared.helpers.deepe_rows.lengths import Lengths

MAX_ROWS = 20
_LISTED_LINES = 5
_LINE = 2**53
_TEXT = "<|im_start|>user\nWhich is larger, 3 or 8?<|im_end|>\n<|im_start|>assistant\n"


class RowsPreview(RequestBody):
    """The rows to show, and what the training would be submitted with."""

    base_model: str = Field(description="Id or name.", examples=["tiny-base"])
    dataset: str = Field(description="Id or name.", examples=["sft-demo"])
    rows: Annotated[list[Annotated[int, Field(ge=1, le=_LINE)]], Field(min_length=1, max_length=MAX_ROWS)] | None = (
        Field(default=None, description="Numbers of lines, from 1; by default the first three rows.", examples=[[1, 7]])
    )
    parameters: Parameters = Field(
        default_factory=dict,
        description="Of the training: names of columns and limits of tokens decide what is learned.",
        examples=[{"max_seq_length": 512}],
    )

    def request(self, method: str) -> PreviewRequest:
        """Return what is asked of the method."""
        return PreviewRequest(method, self.base_model, self.dataset, self.rows, self.parameters)


class SpanRead(Value):
    """Tokens that follow each other and have the same fate."""

    text: str | None = Field(description="Null: too long to be shown.", examples=[_TEXT])
    characters: int = Field(examples=[len(_TEXT)])
    tokens: int = Field(examples=[19])
    learned: bool = Field(description="The model learns to write it; else it is only given.", examples=[False])
    weight: int = Field(
        description="1: learned. 0: only given. -1: what the model learns not to write (rejected).", examples=[0]
    )
    cut: bool = Field(description="Beyond a limit of tokens; the whole sequence is left out.", examples=[False])


class ExceededLimit(Value):
    """A limit that a sequence is over."""

    parameter: str = Field(examples=["max_seq_length"])
    value: int = Field(examples=[1024])


class SequenceRead(Value):
    """What the model sees at once. The texts of the spans together are what the chat template writes."""

    role: str = Field(description="`answer`, `chosen`, `rejected`, `text` or `question`.", examples=["answer"])
    used: bool = Field(description="False: left out of the training.", examples=[True])
    exceeded: list[ExceededLimit] = Field(description="Why it is left out.")
    tokens: int = Field(examples=[23])
    given: int = Field(description="Tokens that are only given.", examples=[19])
    learned: int = Field(description="Tokens that are learned.", examples=[4])
    spans: list[SpanRead]


class RowRead(Value):
    """A row, and what becomes of it."""

    line: int = Field(examples=[1])
    form: str | None = Field(description="How it is written.", examples=["instruction-output"])
    kind: str | None = Field(description="What it is read as.", examples=["conversation"])
    problem: ProblemEntry | None = Field(description="Why it cannot be learned from; a training refuses it.")
    left_out: str | None = Field(description="Code of why nothing is learned from it; see `notes`.")
    notes: list[str] = Field(description="Codes of what is worth knowing about it; see `notes` of the preview.")
    raw: str | None = Field(description="As it stands in the file, where there are no sequences.")
    raw_characters: int | None = Field(description="Its length; a long one is shown in part.")
    sequences: list[SequenceRead]
    sequence_count: int = Field(description="Of a long conversation the first ones are listed.", examples=[1])


class RowsTooLong(ExceededLimit):
    """Rows that are over a limit of tokens."""

    rows: int = Field(description="Of those measured; texts are split, other rows lose what is too long.", examples=[3])


class LengthsRead(Value):
    """Tokens of the rows, counted with the base model's tokenizer and chat template as the training does.

    Of a row it is its longest sequence that counts. Pictures are not counted.
    """

    measured: int = Field(description="Rows looked at: all, or a random sample of a large data set.", examples=[1000])
    total: int = Field(description="Rows of the data set that are used.", examples=[20000])
    tokens: dict[str, int] | None = Field(
        description="So many percent of the rows have no more.",
        examples=[{"p50": 40, "p90": 80, "p99": 120, "p100": 130}],
    )
    learned_share: float | None = Field(
        description="Share of all tokens that is learned; the others are only given.", examples=[0.31]
    )
    too_long: list[RowsTooLong]
    refused: int = Field(description="Rows that a training would refuse; see `notes` or `warnings`.", examples=[0])


class PreviewRead(Value):
    """Rows as a training would learn from them."""

    method: str = Field(examples=["SFT-Demo"])
    base_model: str = Field(examples=["tiny-base"])
    dataset: str = Field(examples=["sft-demo"])
    environment: str = Field(examples=["trl"])
    exact: bool = Field(description="Shown by the code that the training runs. False: the script may do otherwise.")
    learns_from: list[str] | None = Field(
        description="Kinds of rows; null: the method does not say.", examples=[["conversation"]]
    )
    total: int = Field(description="Rows in the data set.", examples=[450])
    rows: list[RowRead]
    lengths: LengthsRead | None = Field(description="Of all rows. Null: rows of this kind have no tokens to count.")
    notes: list[ProblemEntry] = Field(description="What is worth knowing, with the lines that it is about.")


def preview_read(preview: Preview, language: Language) -> PreviewRead:
    """Return a preview as it is answered."""
    return PreviewRead(
        method=preview.method,
        base_model=preview.base_model,
        dataset=preview.dataset,
        environment=preview.environment,
        exact=preview.exact,
        learns_from=None if preview.kinds is None else list(preview.kinds),
        total=preview.total,
        rows=[_row_read(row, language) for row in preview.rows],
        lengths=lengths_read(preview.lengths, preview.parameters),
        notes=problem_entries([*_of_preview(preview), *_of_rows(preview.rows)], language),
    )


def lengths_read(lengths: Lengths | None, parameters: Mapping[str, Any]) -> LengthsRead | None:
    """Return lengths as they are answered, beside the limits among the parameters."""
    if lengths is None:
        return None
    return LengthsRead(
        measured=lengths.measured,
        total=lengths.total,
        tokens=lengths.percentiles,
        learned_share=lengths.learned_share(parameters),
        too_long=[
            RowsTooLong(parameter=name, value=parameters[name], rows=rows)
            for name, rows in lengths.beyond(parameters).items()
        ],
        refused=lengths.refused,
    )


def _row_read(row: Mapping[str, Any], language: Language) -> RowRead:
    problem = row.get("problem")
    refused = [] if problem is None else problem_entries([_problem(row["line"], **problem)], language)
    return RowRead(
        line=row["line"],
        form=row.get("form"),
        kind=row.get("kind"),
        problem=next(iter(refused), None),
        left_out=row.get("left_out"),
        notes=[code for code, _about in row.get("notes", ())],
        raw=row.get("raw"),
        raw_characters=row.get("raw_characters"),
        sequences=[_sequence_read(one) for one in row.get("sequences", ())],
        sequence_count=row.get("sequence_count", 0),
    )


def _sequence_read(one: Mapping[str, Any]) -> SequenceRead:
    exceeded = [ExceededLimit(parameter=name, value=value) for name, value in one["exceeded"].items()]
    return SequenceRead.model_validate({**one, "exceeded": exceeded})


def _problem(line: int, code: str, pointer: str, params: Mapping[str, Any]) -> Violation:
    place = f", {pointer}" if pointer else ""
    return Violation(pointer, code, {**params, "line": line, "place": place})


def _of_preview(preview: Preview) -> list[Violation]:
    """Return what holds for all rows."""
    found = []
    if preview.kinds is None:
        found.append(Violation("/method", "preview_of_unknown_rows", {"method": preview.method}))
    elif not preview.exact:
        found.append(Violation("/method", "preview_of_other_script", {"method": preview.method}))
    if preview.kinds is not None and not preview.tokenized:
        found.append(Violation("/method", "preview_without_tokens", {"kinds": ", ".join(preview.kinds)}))
    if not preview.own_template:
        found.append(Violation("/base_model", "preview_with_plain_template", {"base_model": preview.base_model}))
    if preview.lengths is not None:
        found += length_warnings(preview.lengths, preview.parameters)
    if preview.turn_end is not None:
        found.append(Violation("/base_model", "turn_end_is_not_eos", dict(preview.turn_end)))
    return found


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Violation]:
    """Return what is worth knowing about rows, each once with its lines."""
    lines: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        for code, about in [*row.get("notes", ()), *([(row["left_out"], "")] if row.get("left_out") else ())]:
            lines.setdefault((code, about), []).append(row["line"])
    found = []
    for (code, about), concerned in lines.items():
        first = ", ".join(map(str, concerned[:_LISTED_LINES])) + (", ..." if len(concerned) > _LISTED_LINES else "")
        params = {"rows": len(concerned), "total": len(rows), "lines": first, "column": about, "key": about}
        found.append(Violation("/dataset", code, params))
    return found
