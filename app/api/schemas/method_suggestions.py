"""A proposal of how a script could be called, over the wire."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas.common import StageName
from app.domain.errors import Violation
from app.domain.suggestions import Suggestion
from app.domain.texts import Language
from app.domain.values import Value
from app.registry.scripts.root import MAX_SCRIPT_BYTES


class SuggestionRequest(BaseModel):
    """What is to be proposed."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"source": None, "stage": "training", "conda_env": "trl"}}
    )

    source: str | None = Field(
        default=None,
        max_length=MAX_SCRIPT_BYTES,
        description="Text of a script that is not in the script root yet. It is read, not kept.",
    )
    stage: StageName | None = Field(default=None, description="Absent: what the script is written for, else `training`")
    conda_env: str | None = Field(default=None, description="Absent: the environment that has what is imported")


class PlacedRead(Value):
    """A value of the platform in an option."""

    option: str = Field(examples=["--model_name_or_path"])
    value: str = Field(examples=["{model_path}"])
    why: str
    certain: bool = Field(description="False: the name is used for other things too, so that a person has to look")


class LeftOverRead(Value):
    """An option that no value of the platform goes into."""

    option: str = Field(examples=["--learning_rate"])
    required: bool
    default: Any = None
    why: str


class NoteRead(Value):
    """What is to be known before the proposal is confirmed."""

    code: str
    detail: str


class SuggestionRead(Value):
    """How a stage could be called."""

    kind: StageName
    stage: dict[str, Any] = Field(description="The stage's part of a method: `stages.<kind>`")
    placed: list[PlacedRead]
    left_over: list[LeftOverRead]
    notes: list[NoteRead]
    method: dict[str, Any] | None = Field(
        description="A method with this stage, for `POST /methods`; of trainings only"
    )


def suggestion_read(found: Suggestion, language: Language) -> SuggestionRead:
    """Return the proposal as it is read."""

    def sentence(*why: Violation) -> str:
        return " ".join(one.detail(language) for one in why)

    return SuggestionRead(
        kind=found.stage,
        stage=dict(found.config),
        placed=[
            PlacedRead(option=one.option, value=one.value, why=sentence(*one.why), certain=one.certain)
            for one in found.placed
        ],
        left_over=[
            LeftOverRead(option=one.option, required=one.required, default=one.default, why=sentence(one.why))
            for one in found.left_over
        ],
        notes=[NoteRead(code=one.code, detail=sentence(one)) for one in found.notes],
        method=None if found.method is None else dict(found.method),
    )
