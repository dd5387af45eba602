"""What a stage's script is called with: the contract's arguments of each stage, and their text on the command line.

The builders take values that are ready (paths already relative to the script root) and return names and values in the
contract's order; the renderers turn them into argv. Nothing here knows a shell: an argument is one string, newlines and
all.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, assert_never

from app.domain.enums import JobKind
from app.domain.errors import Invalid
from app.domain.kinds import Stage
from app.domain.names import NO_QUANTIZATION
from app.domain.training_types import InferenceForm

# Linux takes 128 KiB for one argument, its end mark included.
MAX_ARGUMENT_BYTES = 128 * 1024 - 1
# Linux takes a quarter of the stack's limit for all arguments and the environment together: 2 MiB by default.
MAX_ARGUMENTS_BYTES = 1536 * 1024

# The contract's order.
_TRAINING = (
    "train_id",
    "seq",
    "model_name",
    "model_path",
    "dataset_path",
    "output_dir",
    "train_file_name",
    "train_env",
)
_SAVING = ("train_id", "seq", "save_path", "base_path", "adapter_path", "dtype_str", "model_usage_type")
INFERENCE_EXTRAS = ("model_path", "enable_thinking", "chat_template_kwargs")
"""Arguments of inference that are no part of the contract: for scripts that declare them or ignore what is unknown."""
_TEXT_INFERENCE = (
    *("model_id", "model_name", "base_model_path", "prompt", "session_id", "max_length", "max_context_tokens"),
    *("temperature", "top_p", "top_k", "model_type", "template", "system_prompt", "reset_context", "history"),
    *INFERENCE_EXTRAS,
)
_IMAGE_INFERENCE = ("model_path", "lora_path", "prompt", "negative_prompt", "output", "batch_size", "aspect_ratio")
_DEPLOYMENT = (
    *("trainId", "seq", "folderPath", "serverUrl", "modelName", "quantize", "template", "basePath"),
    *("actualPath", "system", "parameters"),
)


class ArgumentForm(StrEnum):
    """How an option of a script wants its value."""

    VALUE = "value"  # --k=v
    FLAG = "flag"  # --k, or nothing
    NEGATABLE = "negatable"  # --k or --no-k
    REPEATED = "repeated"  # --k=a --k=b
    WORDS = "words"  # --k a b
    COUNTED = "counted"  # --k --k
    LIST = "list"  # --k=[...]


class ArgumentTooLong(Invalid):
    """One argument, or all together, are longer than the operating system accepts."""

    code = "argument_too_long"


class ArgumentNotText(Invalid):
    """The value has a NUL or half a character, which no argument can have."""

    code = "argument_not_text"


def render_equals(
    arguments: Mapping[str, Any], *, false_as: str = "False", forms: Mapping[str, ArgumentForm] | None = None
) -> list[str]:
    """Return `--k=v` for each argument. Null is left out, true is `True`, false is `false_as`.

    `forms` has the arguments that a script does not take as `--k=v`: flags, counted ones, lists of words.
    """
    return checked_words(_rendered(arguments, false_as=false_as, forms=forms or {}, pairs=False))


def render_pairs(
    arguments: Mapping[str, Any], *, false_as: str = "False", forms: Mapping[str, ArgumentForm] | None = None
) -> list[str]:
    """Return `--k v` for each argument; otherwise like `render_equals`.

    A value that begins with a hyphen would be taken for an option, so that it is written `--k=v`.
    """
    return checked_words(_rendered(arguments, false_as=false_as, forms=forms or {}, pairs=True))


def value_text(value: Any, *, false_as: str = "False") -> str:
    """Return a value as a script reads it: Python's text, lists and objects as ASCII JSON, strings verbatim."""
    if isinstance(value, bool):
        return "True" if value else false_as
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    return str(value)


def filled_arguments(stage: Stage, form: InferenceForm = InferenceForm.TEXT) -> tuple[str, ...]:
    """Return the names of the arguments that the platform fills in and users cannot set, in the contract's order.

    `form` is that of the method's training type; it matters for inference.
    """
    match stage:
        case JobKind.TRAINING:
            return _TRAINING
        case JobKind.SAVING:
            return _SAVING
        case JobKind.INFERENCE_CUSTOMIZED | JobKind.INFERENCE_COMPLETE:
            return _inference_arguments(form)
        case JobKind.DEPLOYMENT:
            return _DEPLOYMENT
        case _:
            assert_never(stage)


def _inference_arguments(form: InferenceForm) -> tuple[str, ...]:
    match form:
        case InferenceForm.TEXT:
            return _TEXT_INFERENCE
        case InferenceForm.IMAGES:
            return _IMAGE_INFERENCE
        case _:
            assert_never(form)


def training_arguments(
    *,
    train_id: str,
    seq: int,
    model_name: str,
    model_path: str,
    dataset_path: str,
    output_dir: str,
    parameters: Mapping[str, Any],
    train_file_name: str,
    train_env: str,
) -> dict[str, Any]:
    """Return the arguments of a training script; `output_dir` has to be relative (scripts put `../` before it)."""
    head = {
        "train_id": train_id,
        "seq": seq,
        "model_name": model_name,
        "model_path": model_path,
        "dataset_path": dataset_path,
        "output_dir": output_dir,
    }
    tail = {"train_file_name": train_file_name, "train_env": train_env}
    return head | _without(parameters, head | tail) | tail


def saving_arguments(
    *,
    train_id: str,
    seq: int,
    save_path: str,
    base_path: str,
    adapter_path: str,
    dtype_str: str,
    model_usage_type: str,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of a saving script.

    On the paths without `customized` it is the producing script and gets the `training` arguments as well.
    """
    own = {
        "train_id": train_id,
        "seq": seq,
        "save_path": save_path,
        "base_path": base_path,
        "adapter_path": adapter_path,
        "dtype_str": dtype_str,
        "model_usage_type": model_usage_type,
    }
    return own | _without(training or {}, own)


def inference_arguments(
    *,
    model_id: str,
    model_name: str,
    base_model_path: str,
    prompt: str,
    session_id: str = "default",
    max_length: int = 512,
    max_context_tokens: int = 2048,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    model_type: str = "chat",
    template: str = "",
    system_prompt: str | None = None,
    reset_context: bool | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    model_path: str | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of an inference script; `model_path` is the folder of the model that is asked.

    Those behind `template` are left out when they are null. Scripts compare `reset_context` with `true`, whatever
    `false_as` is.
    """
    return {
        "model_id": model_id,
        "model_name": model_name,
        "base_model_path": base_model_path,
        "prompt": prompt,
        "session_id": session_id,
        "max_length": max_length,
        "max_context_tokens": max_context_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "model_type": model_type,
        "template": template,
        "system_prompt": system_prompt,
        "reset_context": None if reset_context is None else json.dumps(reset_context),
        "history": None if history is None else [dict(turn) for turn in history],
        "model_path": model_path,
        "enable_thinking": None if enable_thinking is None else json.dumps(enable_thinking),
        "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
    }


def picture_arguments(
    *,
    model_path: str,
    prompt: str,
    output: str,
    lora_path: str = "",
    negative_prompt: str = "",
    batch_size: int = 1,
    aspect_ratio: str = "1:1",
) -> dict[str, Any]:
    """Return the arguments of a script that generates images.

    It writes `output`; with a `batch_size` above 1 the stem of it with `_001`, `_002` and so on behind.
    """
    return {
        "model_path": model_path,
        "lora_path": lora_path,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "output": output,
        "batch_size": batch_size,
        "aspect_ratio": aspect_ratio,
    }


def deployment_arguments(
    *,
    train_id: str,
    seq: int,
    folder_path: str,
    server_url: str,
    model_name: str,
    quantize: str | None = None,
    template: str = "",
    base_path: str = "",
    actual_path: str = "",
    system: str = "",
    parameters: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments of a deployment script; `folder_path` is absolute, empty `system` and `parameters` null.

    `more`: settings of the deploy target and the caller's parameters.
    """
    own = {
        "trainId": train_id,
        "seq": seq,
        "folderPath": folder_path,
        "serverUrl": server_url,
        "modelName": model_name,
        "quantize": "" if quantize in (None, NO_QUANTIZATION) else quantize,
        "template": template,
        "basePath": base_path,
        "actualPath": actual_path,
        "system": system or None,
        "parameters": dict(parameters) if parameters else None,
    }
    return own | _without(more or {}, own)


def _without(arguments: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in taken}


def _rendered(
    arguments: Mapping[str, Any], *, false_as: str, forms: Mapping[str, ArgumentForm], pairs: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield each argument's name and words."""
    for name, value in arguments.items():
        if value is None:
            continue
        option = f"--{name}"
        match forms.get(name, ArgumentForm.VALUE):
            case ArgumentForm.FLAG:
                words = [option] if value else []
            case ArgumentForm.NEGATABLE:
                words = [option if value else f"--no-{name}"]
            case ArgumentForm.COUNTED:
                words = [option] * int(value)
            case ArgumentForm.WORDS:
                words = [option, *(value_text(item, false_as=false_as) for item in _items(value))]
            case ArgumentForm.REPEATED:
                words = [f"{option}={value_text(item, false_as=false_as)}" for item in _items(value)]
            case ArgumentForm.VALUE | ArgumentForm.LIST:
                text = value_text(value, false_as=false_as)
                words = [option, text] if pairs and not text.startswith("-") else [f"{option}={text}"]
        yield name, words


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def checked_words(rendered: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Return all words, which come with their names; refuse what the operating system would refuse with a crash."""
    argv: list[str] = []
    total = 0
    for name, words in rendered:
        for word in words:
            size = _size(name, word)
            total += size + 1
            if size > MAX_ARGUMENT_BYTES:
                raise ArgumentTooLong(name=name, size=size, limit=MAX_ARGUMENT_BYTES)
            if total > MAX_ARGUMENTS_BYTES:
                raise ArgumentTooLong(name=name, size=total, limit=MAX_ARGUMENTS_BYTES)
            argv.append(word)
    return argv


def _size(name: str, word: str) -> int:
    if "\0" in word:
        raise ArgumentNotText(name=name)
    try:
        return len(word.encode())
    except UnicodeEncodeError as exc:
        raise ArgumentNotText(name=name) from exc
