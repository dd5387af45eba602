"""What a job runs: everything its request resolved to, so that later changes to what it named do not reach it.

Written once, at submit, and kept as JSON in `job.launch`. Paths are relative to `DEEPE_HOME`.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict

from app.domain.deploy_targets import DeployTargetKind
from app.domain.enums import TrainingType
from app.domain.environment_locks import EnvironmentLock
from app.domain.kinds import KINDS
from app.domain.launchers import AnswerServer, Launcher, Strategy
from app.domain.rendering import ArgumentForm
from app.domain.secret_references import with_values
from app.domain.stage_calls import StageCall
from app.domain.values import Value
from app.store.tables import JobRow


class _Frozen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedScript(_Frozen):
    """The bytes a stage runs. `shipped`: part of the product, not a file of the script root.

    `tree`: digest of all files that run; None for shipped ones, and in jobs of earlier releases. `module`: what
    `python -m` is given to run the file.
    """

    file: str
    sha256: str
    size: int
    shipped: bool = False
    tree: str | None = None
    committed: bool = False
    module: str | None = None


class Named(_Frozen):
    """A base model, data set or reward model as it was when the job was submitted."""

    id: str
    name: str
    path: str
    digest: str | None = None
    dtype: str | None = None


class InferenceRequest(_Frozen):
    """What an inference script is called with.

    The fields from `negative_prompt` on are for models that generate images.
    """

    prompt: str
    history: tuple[dict[str, Any], ...]
    session_id: str
    system_prompt: str | None = None
    max_length: int = 512
    max_context_tokens: int = 2048
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    template: str = ""
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    negative_prompt: str = ""
    batch_size: int = 1
    aspect_ratio: str = "1:1"


class Deployment(_Frozen):
    """Where and how an online model is served; `url` is empty for the target `custom`.

    `kind` says whose program deploys: ours to Ollama, or a script of the user's.
    """

    target: str
    kind: DeployTargetKind = DeployTargetKind.OLLAMA
    url: str = ""
    settings: dict[str, Any] = {}
    quantize: str | None = None
    template: str = ""
    system: str = ""
    parameters: dict[str, Any] = {}


class RunnerCall(_Frozen):
    """A call of DeepExtension's backend: the script's arguments as they are, and where the backend looks for the rest.

    `label`: of the log record of the end, None where there is none. `output`: folder that the script writes into,
    relative to the script root. `platform`, `parameters`: what it has for the placeholders of a method that says itself
    how its script is called; paths are absolute.
    """

    arguments: tuple[str, ...] = ()
    platform: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    status_key: str | None = None
    seq: Any = None
    label: str | None = None
    output: str | None = None


class Comparison(_Frozen):
    """A person's question, asked again to see whether the base model's answer is the same.

    `question`: the person's job. `base`: the base model takes the place of the customized or complete one.
    """

    question: str
    base: bool = False


class EnvironmentBuild(_Frozen):
    """An environment to build or pack: its name, `environment.yml` (None: plain Python), and a lock to keep to."""

    name: str
    spec: str | None
    action: Literal["build", "pack"] = "build"
    lock: EnvironmentLock | None = None


class HubModel(_Frozen):
    """A model on a hub."""

    repository: str
    revision: str


class RowsToPreview(_Frozen):
    """How the rows of a preview are read (see `deepe_rows.Wanted`), and which: `lines` None are the first ones.

    `limit`: rows that the training uses, if it is positive. `measure`: say how many tokens all rows have as well.
    """

    kinds: tuple[str, ...]
    tools: bool = True
    pictures: bool = False
    columns: tuple[str, ...] | None = None
    form: str | None = None
    limit: int = -1
    lines: tuple[int, ...] | None = None
    measure: bool = True


class JobSpec(_Frozen):
    """Everything that the arguments of a job are made of, save what only the launch knows.

    `effective`: every parameter that the script gets, the caller's and the platform's.
    """

    training_type: TrainingType = TrainingType.CHAT
    technique: str = ""
    script: PinnedScript | None = None
    call: StageCall = StageCall()
    launcher: Launcher = Launcher()
    strategy: Strategy | None = None  # accelerate starts the stage with a configuration for it
    server: AnswerServer | None = None  # the stage starts it
    output: str | None = None  # where in the output folder the model lies
    declared: tuple[str, ...] | None = None
    declared_only: bool = False
    withheld: tuple[str, ...] = ()  # the script would take them for abbreviations of its own
    false_as: str = "False"
    forms: dict[str, ArgumentForm] = {}
    base_model: Named | None = None
    permits: tuple[str, ...] | None = None  # what of a model's author may run when it is loaded; None: unasked
    dataset: Named | None = None
    validation_dataset: Named | None = None  # rows for the score; `effective` names their file to the script
    reward_model: Named | None = None  # judges a training; `effective` names its folder to the script
    effective: dict[str, Any] = {}
    files: dict[str, PinnedScript] = {}  # by parameter: of the script root, its bytes run
    named_paths: tuple[str, ...] = ()  # of these, paths relative to the script root that the platform made
    modules: tuple[str, ...] = ()  # that these values need in the environment
    cuda: bool = False  # these values need an NVIDIA GPU
    question: InferenceRequest | None = None  # the key in rows of earlier releases
    deployment: Deployment | None = None
    runner_call: RunnerCall | None = None
    comparison: Comparison | None = None
    build: EnvironmentBuild | None = None
    hub: HubModel | None = None  # what is downloaded as the base model
    sample: str | None = None  # sample of the product whose program makes the base model
    preview: RowsToPreview | None = None
    resume_of: str | None = None  # job whose newest checkpoint the first attempt goes on from
    wait: bool = False  # for an environment that no node has or can build yet

    @classmethod
    def of(cls, job: JobRow) -> Self:
        """Return the specification of a job."""
        return cls.model_validate(job.launch)

    def document(self) -> dict[str, Any]:
        """Return the JSON that a job keeps."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def referring(self) -> Mapping[str, Any]:
        """Return what may refer to secrets: where it stands, for people, and the document that stands there."""
        found: dict[str, Any] = {f"env {name}": text for name, text in self.call.env.items()}
        found |= {"arguments": self.call.arguments, "config": self.call.config.content if self.call.config else None}
        if self.deployment is not None:
            found |= {f"settings {name}": value for name, value in self.deployment.settings.items()}
        if self.runner_call is not None:
            found |= {"arguments of the call": self.runner_call.arguments, "parameters": self.runner_call.parameters}
        return found | {f"parameters {name}": value for name, value in self.effective.items()}

    def with_secrets(self, values: Mapping[str, str]) -> Self:
        """Return the specification with secrets in the place of references; never store it."""
        document = self.document()
        in_templates = {name: value.replace("{", "{{").replace("}", "}}") for name, value in values.items()}
        for part, those in (("call", in_templates), ("runner_call", values), ("effective", values)):
            if part in document:
                document[part] = with_values(document[part], those)
        if "settings" in document.get("deployment", {}):
            document["deployment"]["settings"] = with_values(document["deployment"]["settings"], values)
        return type(self).model_validate(document)


def is_runner_call(job: JobRow) -> bool:
    """Say whether a call of DeepExtension's backend made the job."""
    return job.launch.get("runner_call") is not None


def is_comparison(job: JobRow) -> bool:
    """Say whether the job repeats a person's question to compare answers."""
    return job.launch.get("comparison") is not None


def status_key(job: JobRow) -> str | None:
    """Return the status key that the job shares with DeepExtension's scripts and backend; None if it has none."""
    call = job.launch.get("runner_call")
    if call is not None:
        key: str | None = call.get("status_key")
        return key
    return job.id if KINDS[job.kind].reports_status_key else None
