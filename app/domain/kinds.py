"""The kinds of jobs: which of them are stages of a method."""

from typing import Literal, get_args

from app.domain.enums import JobKind

Stage = Literal[
    JobKind.TRAINING,
    JobKind.SAVING,
    JobKind.INFERENCE_CUSTOMIZED,
    JobKind.INFERENCE_COMPLETE,
    JobKind.DEPLOYMENT,
]
"""A step of a method: a Python file and a conda environment."""

STAGES: tuple[Stage, ...] = get_args(Stage)

# The members of `stages` in a method; a deployment has a member of its own.
METHOD_STAGES = tuple(stage for stage in STAGES if stage is not JobKind.DEPLOYMENT)


def as_stage(kind: JobKind) -> Stage:
    """Return a kind that is a stage. Raises `ValueError` for the building of an environment."""
    if kind is JobKind.ENVIRONMENT:
        raise ValueError(f"{kind} is not a stage")
    return kind
