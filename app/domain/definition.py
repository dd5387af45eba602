"""A method as it travels over the wire.

The parser is lenient: only a body of the wrong JSON type is refused here. What a path needs and lacks, and every
value that is unknown, is for `app.domain.lifecycle.violations` to say, all at once. A member that is present counts as
configured, even as `{}`; absent or null does not.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from app.domain.enums import JobKind, ModelState
from app.domain.kinds import KINDS, METHOD_STAGES, Member, Stage
from app.domain.launchers import Launcher, LauncherKind
from app.domain.names import normal_name
from app.domain.training_types import TYPE_NAMES

DEFAULT_TECHNIQUE = "custom"
CUSTOM_TARGET = "custom"
FALSE_AS = ("False", "false", "")
ROW_KINDS = ("conversation", "text", "preference", "labelled", "pair", "graded", "question", "caption")
"""What the reader of rows makes of them (`deepe_rows`)."""

_EXAMPLE: dict[str, Any] = {
    "name": "finance-sft",
    "description": "",
    "training_type": "chat",
    "technique": "sft",
    "lifecycle": ["customized", "complete", "online"],
    "stages": {
        "training": {"file": "finance_sft.py", "conda_env": "trl"},
        "saving": {"file": "merge.py", "conda_env": "trl"},
        "inference-customized": {"file": "ask.py", "conda_env": "trl"},
    },
    "inference": {"customized": True, "complete": False},
    "deployment": {"target": "custom", "file": "deploy.py", "conda_env": "base"},
}


class Wire(BaseModel):
    """Part of a method: frozen, null means absent."""

    # unknown members are kept, because the rules report each of them with its pointer
    model_config = ConfigDict(frozen=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return (
            {name: member for name, member in value.items() if member is not None} if isinstance(value, dict) else value
        )

    @property
    def unknown(self) -> dict[str, Any]:
        """Unknown members, in the order given."""
        return dict(self.model_extra or {})


class LauncherConfig(Wire):
    """How the file of a stage is started."""

    kind: str | None = Field(
        default=None, description="`python` (one process), `torchrun` or `accelerate` (a group of processes)"
    )
    processes: StrictInt | None = Field(
        default=None,
        description="Processes of the group, and the accelerators that a job asks for unless it says how many; absent: "
        "one for each accelerator of the job",
    )


class ConfigTemplate(Wire):
    """A configuration file that is written for each run."""

    name: str | None = Field(default=None, description="Name of the file; `.yaml`, `.json` or `.toml` says its format")
    content: dict[str, Any] | list[dict[str, Any]] | None = Field(
        default=None,
        description="What is written, an object or a list of objects; texts may have placeholders, and one that is a "
        "single placeholder keeps the type of its value. An entry whose parameter has no value is left out",
    )


class RunConfig(Wire):
    """What is run in a conda environment, and how it is called: a Python file of the script root, or a module."""

    file: str | None = Field(default=None, description="Python file, relative to the script root")
    conda_env: str | None = Field(default=None, description="Name of the conda environment that runs the file")
    module: str | None = Field(
        default=None, description="Instead of `file`: module that is run as `python -m`, of the environment or the root"
    )
    arguments: list[str | list[str]] | None = Field(
        default=None,
        description="Exactly these, in this order, with placeholders; a list within is given or left out as a whole. "
        "Absent: as DeepExtension calls scripts",
    )
    config: ConfigTemplate | None = Field(default=None, description="Absent: no configuration file is written")
    env: dict[str, str] | None = Field(
        default=None, description="Environment variables of the process; values may have placeholders"
    )
    working_directory: str | None = Field(
        default=None,
        description="`scripts` (the script root, default), `method` (the folder of the file) or `run` (the folder of "
        "the attempt)",
    )
    include: list[str] | None = Field(
        default=None,
        description="Files that are pinned and run with the file beside the modules that it imports: patterns such as "
        "`configs/*.yaml` or `**`, from the folder of the file; with a `/` before them from the script root",
        examples=[["configs/*.yaml"]],
    )


class StageConfig(RunConfig):
    """What one stage runs; `training` and `saving` may be a group of processes."""

    launcher: LauncherConfig | None = Field(default=None, description="Absent: one Python process")
    output: str | None = Field(
        default=None,
        description="Where in the output folder the model lies: a path or a pattern such as `final` or `checkpoint-*`, "
        "of which the newest counts; `training` and `saving`. Absent: the output folder itself",
    )


class InferenceSwitches(Wire):
    """Which models of the method accept inference."""

    customized: StrictBool | None = Field(default=None, description="The customized model can be asked")
    complete: StrictBool | None = Field(default=None, description="The complete model can be asked")


class DeploymentConfig(RunConfig):
    """Where the online model is served; a custom target takes a file and an environment."""

    target: str | None = Field(
        default=None,
        description="Name of a configured deploy target, or `custom` for a script that knows where to deploy itself",
    )


class ArgumentOptions(Wire):
    """How a script wants its arguments."""

    false_as: str = Field(
        default="False",
        description="Text of a false value: `False`, `false`, or empty for scripts that declare `type=bool`",
    )
    declared_only: StrictBool = Field(
        default=False, description="Pass only the arguments that the script declares, for scripts that refuse others"
    )


class DataConfig(Wire):
    """What the training script learns from; a submit refuses other data."""

    learns_from: list[str] = Field(
        default_factory=list,
        description=f"Kinds of examples: {', '.join(f'`{kind}`' for kind in ROW_KINDS)}",
    )
    tools: StrictBool = Field(default=True, description="Conversations may have tools and calls of them")
    pictures: StrictBool = Field(default=False, description="Rows may name pictures")


class RepositoryConfig(Wire):
    """A commit of a git repository that the API's machine has: the files of the stages are taken from it."""

    git: str | None = Field(default=None, description="Absolute path of the repository, or a file:// address")
    commit: str | None = Field(default=None, description="Full hash of the commit")


class MethodDefinition(Wire):
    """A training method: what it trains, the path of its model, and what runs at every stage."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})

    name: str | None = Field(default=None, description="Unique name: 1 to 100 letters, digits, spaces or ._-")
    description: str = Field(default="", description="Free text")
    training_type: str | None = Field(default=None, description=TYPE_NAMES)
    technique: str = Field(default=DEFAULT_TECHNIQUE, description="Label of what the method does, such as `sft`")
    lifecycle: list[str] | None = Field(
        default=None, description="States of the method's model, one of the six paths, in order"
    )
    stages: dict[str, StageConfig | None] = Field(
        default_factory=dict,
        description=f"{', '.join(f'`{stage}`' for stage in METHOD_STAGES)}: a file or module, and an environment",
    )
    inference: InferenceSwitches | None = None
    deployment: DeploymentConfig | None = None
    arguments: ArgumentOptions = Field(default_factory=ArgumentOptions)
    data: DataConfig | None = Field(default=None, description="Absent: nothing is known, and any data is taken")
    repository: RepositoryConfig | None = Field(default=None, description="Absent: the files lie in the script root")

    @field_validator("name")
    @classmethod
    def _normalise_name(cls, name: str | None) -> str | None:
        return None if name is None else normal_name(name)

    @field_validator("technique")
    @classmethod
    def _blank_technique_is_absent(cls, technique: str) -> str:
        return technique if technique.strip() else DEFAULT_TECHNIQUE

    def stage_config(self, stage: Stage) -> RunConfig | None:
        """Return what `stage` runs, `None` if it is not configured.

        A deployment counts whatever its target is; ask `deploys_itself` whether it has a file of its own.
        """
        return self.deployment if KINDS[stage].member is Member.DEPLOYMENT else self.stages.get(stage)

    def own_stages(self) -> dict[Stage, RunConfig]:
        """Return the stages that run code of the method's own, in their order."""
        deployment: list[Stage] = [JobKind.DEPLOYMENT] if self.deploys_itself else []
        configs = {stage: self.stage_config(stage) for stage in [*METHOD_STAGES, *deployment]}
        return {stage: config for stage, config in configs.items() if config is not None}

    def launcher(self, stage: Stage) -> Launcher:
        """Return how `stage` of a valid method is started."""
        config = self.stages.get(stage)
        given = config.launcher if config is not None else None
        return Launcher() if given is None else Launcher(kind=LauncherKind(given.kind or ""), processes=given.processes)

    def output(self, stage: Stage) -> str | None:
        """Return where in the output folder of `stage` its model lies; `None`: the folder itself."""
        config = self.stages.get(stage)
        return config.output if config is not None else None

    @property
    def deploys_itself(self) -> bool:
        """Whether the deployment runs the method's own file, which configured targets of other kinds refuse."""
        deployment = self.deployment
        return deployment is not None and (deployment.target == CUSTOM_TARGET or deployment.conda_env is not None)

    def switched_on(self, state: ModelState) -> bool:
        """Whether the model in `state` accepts inference."""
        return bool(self.inference and getattr(self.inference, state, None) is True)

    def canonical(self) -> dict[str, Any]:
        """Return the wire JSON in its one form: defaults filled in, absent members left out, stages in order."""
        wire: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "training_type": self.training_type,
            "technique": self.technique,
            "lifecycle": self.lifecycle,
            "stages": {name: _dump(config) for name, config in self._ordered_stages()},
            "inference": {
                "customized": self.switched_on(ModelState.CUSTOMIZED),
                "complete": self.switched_on(ModelState.COMPLETE),
                **(self.inference.unknown if self.inference else {}),
            },
            "deployment": _dump(self.deployment) if self.deployment is not None else None,
            "arguments": _dump(self.arguments),
            "data": _dump(self.data) if self.data is not None else None,
            "repository": _dump(self.repository) if self.repository is not None else None,
            **self.unknown,
        }
        return {name: value for name, value in wire.items() if value is not None}

    def _ordered_stages(self) -> list[tuple[str, StageConfig]]:
        order = {stage.value: position for position, stage in enumerate(METHOD_STAGES)}
        present = [(name, config) for name, config in self.stages.items() if config is not None]
        return sorted(present, key=lambda item: order.get(item[0], len(order)))


def _dump(value: Wire) -> dict[str, Any]:
    return value.model_dump(exclude_none=True)
