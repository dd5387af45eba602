"""Bodies of the requests that submit, copy or retry a job. Plans are made from them."""

import json
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from app.domain.demand import DEFAULT_QUEUE, LEAST_PRIORITY, MOST_PRIORITY, QueueName, Resources, UserName
from app.domain.retries import Limits, RetryPolicy
from app.registry.datasets.mixes import MAX_PARTS, MixPart

_ID = "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"
_PARAMETERS = {"learning_rate": 0.0002, "max_steps": 100}
MAX_NAME = 100
_MAX_TEXT = 100_000
MAX_PARAMETERS: Final = 1000
MAX_PARAMETER_BYTES: Final = 1024 * 1024
"""Of all parameters of a job, written as JSON."""

JobName = Field(
    default=None, min_length=1, max_length=MAX_NAME, description="Default: the method's name.", examples=["faq, rank 8"]
)


Priority = Field(
    default=0, ge=LEAST_PRIORITY, le=MOST_PRIORITY, description="Smaller starts first; then the older one."
)


def _bounded(parameters: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(parameters)) > MAX_PARAMETER_BYTES:
        raise PydanticCustomError("too_long", "too much text", {"max_length": MAX_PARAMETER_BYTES})
    return parameters


Parameters = Annotated[dict[str, Any], Field(max_length=MAX_PARAMETERS), AfterValidator(_bounded)]
"""Parameters of a job; they are kept with it and shown with it."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DeploymentOptions(_Body):
    """How an online model is served; for Ollama."""

    quantize: str | None = Field(default=None, max_length=50, examples=["q4_K_M"])
    template: str = Field(default="", max_length=_MAX_TEXT, description="Prompt template.")
    system: str = Field(default="", max_length=_MAX_TEXT, description="System prompt.")
    parameters: Parameters = Field(default_factory=dict, examples=[{"temperature": 0.2}])


class JobSubmit(_Body):
    """A chain of jobs (`base_model`, `dataset`, `through`), or one stage (`stage`, and the `model` it works on)."""

    method: str = Field(description="Id or name.", examples=["SFT-Demo"])
    base_model: str | None = Field(default=None, description="Id or name.", examples=["tiny-base"])
    dataset: str | None = Field(default=None, description="Id or name.", examples=["sft-demo"])
    datasets: list[MixPart] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_PARTS,
        description="Several data sets instead of `dataset`: they become one (see `POST /api/v1/datasets:mix`), or the "
        "one that was made of them before.",
        examples=[None],
    )
    validation_dataset: str | None = Field(
        default=None,
        description="Rows for the score, instead of a held-out part of the data set; id or name. The script must "
        "declare `validation_path`.",
        examples=["sft-demo-held-out"],
    )
    adapter_name_or_path: str | None = Field(
        default=None,
        description="Customized model that the training goes on from, instead of a new adapter; id or name. It must "
        "have been made from the base model, and the script must declare `adapter_name_or_path`.",
        examples=["tiny-base_faq_20261123_5075"],
    )
    reward_model: str | None = Field(
        default=None,
        description="Reward model that judges the answers, such as one of Reward-Demo; id or name. The script must "
        "declare `reward_model_path`.",
        examples=["tiny-styles_judge_20261123_5075"],
    )
    parameters: Parameters = Field(
        default_factory=dict,
        description="What the training script takes; see `GET /api/v1/methods/{method}/parameters`.",
        examples=[_PARAMETERS],
    )
    through: str | None = Field(
        default=None,
        description="How far the model shall go: `customized`, `complete` or `online`.",
        examples=["complete"],
    )
    stage: str | None = Field(default=None, description="Run this stage only.", examples=["saving"])
    model: str | None = Field(default=None, description="Id or name of the model that `stage` works on.")
    name: str | None = JobName
    deployment: DeploymentOptions = Field(default_factory=DeploymentOptions)
    retry: RetryPolicy = Field(
        default_factory=RetryPolicy, description="When each job of the chain is run again by itself."
    )
    limits: Limits = Field(default_factory=Limits, description="When an attempt of each job of the chain is stopped.")
    resources: Resources = Field(
        default_factory=Resources,
        description="What a node must have. Accelerators and their memory are for the stage that produces the model, "
        "the labels for every stage of the chain.",
    )
    priority: int = Priority
    queue: QueueName = Field(default=DEFAULT_QUEUE, description="Queue whose limits apply; see `GET /api/v1/queues`.")
    user: UserName = Field(
        default="",
        description="For whom it runs: limits per user go by this name. Default: the name of the caller's API key.",
        examples=["ann@example.com"],
    )
    wait: bool = Field(
        default=False,
        description="Accept the jobs although no registered node can run them as things are; they wait for one.",
    )


class JobCopy(_Body):
    """The differences of a copy."""

    parameters: Parameters = Field(
        default_factory=dict,
        description="Put over the parameters of the original; null leaves one out.",
        examples=[{"learning_rate": 0.0001}],
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=MAX_NAME, description="Default: the original's name."
    )
    base_model: str | None = Field(default=None, description="Another base model; id or name.")
    dataset: str | None = Field(default=None, description="Another data set; id or name.")
    validation_dataset: str | None = Field(
        default=None, description="Other rows for the score; id or name. Null leaves them out. Default: the original's."
    )
    adapter_name_or_path: str | None = Field(
        default=None,
        description="Another customized model to go on from; id or name. Null makes a new adapter. Default: the "
        "original's.",
    )
    reward_model: str | None = Field(
        default=None,
        description="Another reward model; id or name. Null leaves it out. Default: the original's.",
    )
    retry: RetryPolicy | None = Field(default=None, description="Default: the original's.")
    limits: Limits | None = Field(default=None, description="Default: the original's.")
    resources: Resources | None = Field(default=None, description="Default: the original's.")
    priority: int | None = Field(
        default=None, ge=LEAST_PRIORITY, le=MOST_PRIORITY, description="Default: the original's."
    )
    queue: QueueName | None = Field(default=None, description="Default: the original's.")
    user: UserName | None = Field(default=None, description="Default: the original's.")


class JobRetry(_Body):
    """How the retry differs from the job; an empty body repeats it."""

    resume: bool | None = Field(
        default=None,
        description="Go on from the newest checkpoint of the job. Default: when it left a whole one and no parameter "
        "that matters to it was changed. True demands one, also for changed parameters (such as more steps); false "
        "begins at the beginning.",
    )
    parameters: Parameters = Field(
        default_factory=dict,
        description="Put over the parameters of the job; null leaves one out.",
        examples=[{"batch_size": 4, "grad_accum_steps": 2}],
    )
    fix: bool = Field(default=False, description="Make the changes that the job offers in `fix`.")
