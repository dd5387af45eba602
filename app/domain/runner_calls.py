"""Calls of DeepExtension's backend: what their bodies mean to a stage's script.

The backend sends JSON objects; a member counts as given when it is there, null included. The members become the
arguments of the contract in its order. What is rendered here is what DeepExtension's own runner renders: null is the
text `None` save for trainings, where it leaves the argument out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from app.domain.enums import JobKind
from app.domain.kinds import Stage, stages_where
from app.domain.rendering import value_text

Body = Mapping[str, Any]

MAX_KEY_LENGTH: Final = 200
DEFAULT_LABEL: Final = "Training"
TRAINING_REQUIRED: Final = ("train_id", "seq")
SAVING_REQUIRED: Final = ("baseModelPath", "loraAdapterPath", "savePath", "modelUsageType", "trainId", "seq")
DEPLOYMENT_REQUIRED: Final = ("folderPath", "serverUrl", "modelName", "trainId", "seq")
QUESTION_REQUIRED: Final = ("modelName", "prompt")

_ASKING = stages_where(lambda rule: rule.is_inference)
_ENVIRONMENT = "base"
_SAVING_FILE = "linux_code/save_model"
_QUESTION_FILE = "qwen_inference"
_DEPLOYMENT_FILE = "deploy_ollama"
_PICTURES_ENVIRONMENT = "sd"
_DTYPE = "bfloat16"
_NO_PARAMETERS: tuple[Any, ...] = (None, "", "{}", {})
SAVING_LABEL: Final = "Save"
DEPLOYMENT_LABEL: Final = "Deploy"
# argument of the script → member of the body
_SAVING = {
    "train_id": "trainId",
    "seq": "seq",
    "save_path": "savePath",
    "base_path": "baseModelPath",
    "adapter_path": "loraAdapterPath",
    "dtype_str": "dtypeStr",
    "model_usage_type": "modelUsageType",
}
PATHS: Final = frozenset(
    {"model_path", "dataset_path", "output_dir", "save_path", "base_path", "adapter_path", "base_model_path"}
    | {"folderPath", "basePath", "actualPath", "lora_path", "output"}
)
"""Arguments that are paths, from the script root."""
_SAVING_RECORDS = ("base_path", "adapter_path", "save_path", "dtype_str", "train_id", "seq", "model_usage_type")
_RECORDED_AS = {"model_usage_type": "modelUsageType"}
_DEPLOYMENT = (
    *("trainId", "seq", "folderPath", "serverUrl", "modelName"),
    *("quantize", "template", "basePath", "actualPath"),
)
_QUESTION: Mapping[str, tuple[str, Any]] = {
    "model_id": ("modelId", "0"),
    "model_name": ("modelName", None),
    "base_model_path": ("baseModelPath", None),
    "prompt": ("prompt", None),
    "session_id": ("sessionId", "default"),
    "max_length": ("maxLength", 512),
    "max_context_tokens": ("maxContentTokens", 2048),
    "temperature": ("temperature", 0.7),
    "top_p": ("topP", 0.9),
    "top_k": ("topK", 50),
}
_QUESTION_MORE = {
    "model_type": "modelType",
    "template": "template",
    "system_prompt": "systemPrompt",
    "reset_context": "resetContext",
    "history": "history",
}
_PICTURES = {
    "model_path": "model",
    "lora_path": "loraPath",
    "prompt": "prompt",
    "negative_prompt": "negativePrompt",
    "batch_size": "batchSize",
    "aspect_ratio": "aspectRatio",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call asks for.

    `stages`: whose script runs; the first one unless a method has the file at a later one. `file`: None if the body
    names none. `key`: the caller's id of the task, under which it looks for the status. `started` and `ended` are the
    labels of the log records, None where the runner writes none; `records` are the texts of its parameter records,
    which come after that of the start unless `records_first`.
    `output`: folder that the script writes into, relative to the script root.
    """

    stages: tuple[Stage, ...]
    file: str | None
    environment: str
    arguments: Mapping[str, Any]
    body: Body
    values: Mapping[str, Any]
    """What a method that says itself how its script is called has for its placeholders; null where nothing is given."""
    name: str
    key: str | None = None
    seq: Any = None
    started: str | None = None
    ended: str | None = None
    records: Sequence[str] = ()
    records_first: bool = False
    output: str | None = None
    pictures: bool = False
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for a script that declares them."""
    options: Mapping[str, Any] | None = None
    """`parameters` of a deployment, for a script that reads JSON there. None: there are none, or they are no object."""
    has_options: bool = False
    """Whether any were given."""


def missing(body: Body, required: Sequence[str]) -> list[str]:
    """Return the members that are not there."""
    return [name for name in required if name not in body]


def key_of(value: Any) -> str | None:
    """Return the status key of a task's id; None for null."""
    return None if value is None else value_text(value)


def training_call(body: Body) -> Call:
    """Return the call of `/transferTrain`: every member is an argument, in the order of the body."""
    return Call(
        stages=(JobKind.TRAINING,),
        file=_given(body, "train_file_name"),
        environment=_given(body, "train_env") or "",
        arguments=body,
        values=body,
        body=body,
        name=_given(body, "train_name") or _given(body, "training_name") or DEFAULT_LABEL,
        key=key_of(body.get("train_id")),
        seq=body.get("seq"),
        started=_label(body, "training_name"),
        ended=_label(body, "train_name"),
        records=(repr(dict(body)),),
        records_first=True,
        output=_given(body, "output_dir"),
    )


def saving_call(body: Body) -> Call:
    """Return the call of `/mergeModel`."""
    given = {**body, "dtypeStr": body.get("dtypeStr", _DTYPE)}
    arguments = {name: _text(given.get(member)) for name, member in _SAVING.items()}
    return Call(
        stages=(JobKind.SAVING,),
        file=_given(body, "savePythonFile") or _SAVING_FILE,
        environment=_given(body, "condaEnv") or _ENVIRONMENT,
        arguments=arguments,
        values={name: given.get(member) for name, member in _SAVING.items()},
        body=body,
        name=f"Save {_text(body.get('savePath'))}",
        key=key_of(body.get("trainId")),
        seq=body.get("seq"),
        started=SAVING_LABEL,
        ended=SAVING_LABEL,
        records=tuple(f"{_RECORDED_AS.get(name, name)}:{arguments[name]}" for name in _SAVING_RECORDS),
        output=_given(body, "savePath"),
    )


def deployment_call(body: Body, *, folder: str) -> Call:
    """Return the call of `/deployModel`; `folder` is the absolute path of what is deployed."""
    given = {**body, "folderPath": folder}
    arguments = {name: _text(given.get(name, "")) for name in _DEPLOYMENT}
    return Call(
        stages=(JobKind.DEPLOYMENT,),
        file=_given(body, "deployPythonFile") or _DEPLOYMENT_FILE,
        environment=_given(body, "condaEnv") or _ENVIRONMENT,
        arguments=arguments,
        values={name: given.get(name) for name in (*_DEPLOYMENT, "system")},
        body=body,
        name=f"Deploy {_text(body.get('modelName'))}",
        key=key_of(body.get("trainId")),
        seq=body.get("seq"),
        started=DEPLOYMENT_LABEL,
        ended=DEPLOYMENT_LABEL,
        optional={"system": body["system"]} if body.get("system") else {},
        options=options_of(body.get("parameters")),
        has_options=body.get("parameters") not in _NO_PARAMETERS,
    )


def options_of(parameters: Any) -> Mapping[str, Any] | None:
    """Return `parameters` of a deployment, an object or its JSON text; None if they are neither."""
    try:
        found = json.loads(parameters) if isinstance(parameters, str) else parameters
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def question_call(body: Body) -> Call:
    """Return the call of `/chat`."""
    arguments: dict[str, Any] = {
        name: _text(body.get(member, default)) for name, (member, default) in _QUESTION.items()
    }
    arguments["model_type"] = _text(body.get("modelType") or "chat")
    arguments["template"] = _text(body.get("template", ""))
    if "systemPrompt" in body:
        arguments["system_prompt"] = _text(body["systemPrompt"])
    if "resetContext" in body:
        arguments["reset_context"] = _text(body["resetContext"]).lower()
    if "history" in body:
        arguments["history"] = json.dumps(body["history"])
    members = {name: body.get(member, default) for name, (member, default) in _QUESTION.items()}
    members |= {name: body.get(member) for name, member in _QUESTION_MORE.items()}
    return Call(
        stages=_ASKING,
        file=_given(body, "promptFile") or _QUESTION_FILE,
        environment=_given(body, "condaEnv") or _ENVIRONMENT,
        arguments=arguments,
        values=members,
        body=body,
        name=_text(body.get("modelName")),
    )


def pictures_call(body: Body, *, task: str) -> Call:
    """Return the call of `/imageProcessingByModel`; the pictures are named after the task."""
    given = {name: body.get(member) for name, member in _PICTURES.items()}
    head = ("model_path", "lora_path", "prompt", "negative_prompt")
    arguments = {
        **{name: given[name] for name in head},
        "output": f"../images/{task}.png",
        **{name: value for name, value in given.items() if name not in head},
    }
    return Call(
        stages=_ASKING,
        file=_given(body, "promptFile"),
        environment=_given(body, "condaEnv") or _PICTURES_ENVIRONMENT,
        # what is not given is left to the script
        arguments={name: None if value is None else _text(value) for name, value in arguments.items()},
        values=arguments,
        body=body,
        name=_text(body.get("model", "")),
        key=task,
        pictures=True,
    )


def _label(body: Body, member: str) -> str:
    return _text(body.get(member, DEFAULT_LABEL))


def _given(body: Body, member: str) -> str | None:
    """Return a member's text; None if it is absent, null or empty."""
    value = body.get(member)
    return None if value is None or value == "" else _text(value)


def _text(value: Any) -> str:
    """Return the value as Python writes it."""
    return value if isinstance(value, str) else str(value)
