"""What the bodies of several nouns share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from app.domain.allow_lists import MAX_ALLOWED
from app.domain.enums import JobKind
from app.domain.kinds import STAGES, Stage

ID = "5b0e4c1e-9f3d-4a59-8f5e-0d6f3f8f2a11"
JOB_ID = "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
MAX_TEXT = 10_000


class RequestBody(BaseModel):
    """What a caller sends; an unknown member is refused."""

    model_config = ConfigDict(extra="forbid")


class AllowListWrite(RequestBody):
    """What may use an environment. An empty list allows everything; of several lists each has to allow a job."""

    methods: list[str] = Field(
        default=[],
        max_length=MAX_ALLOWED,
        description="By name, those of other projects by id. The id is kept: a new method of the name is not meant.",
        examples=[["finance-sft"]],
    )
    projects: list[str] = Field(default=[], max_length=MAX_ALLOWED, examples=[["default"]])


class _StageSchema:
    """Makes `Stage` a named schema of its own, with the messages of an enum."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.enum_schema(JobKind, list(STAGES), sub_type="str", ref="Stage")

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = handler(schema)
        description = "Step of a method: a Python file and a conda environment."
        handler.resolve_ref_schema(reference).update(title="Stage", description=description)
        return reference


StageName = Annotated[Stage, _StageSchema()]
"""A stage over the wire."""
