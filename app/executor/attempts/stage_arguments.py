"""What a stage's script is called with: values of one job, as the contract or the method writes them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never
from uuid import UUID

from app.domain.enums import JobKind, ModelState
from app.domain.errors import Violation
from app.domain.kinds import KINDS, ArgumentStyle
from app.domain.names import online_name
from app.domain.plain_text import shown
from app.domain.rendering import (
    deployment_arguments,
    inference_arguments,
    picture_arguments,
    render_equals,
    render_pairs,
    saving_arguments,
    training_arguments,
)
from app.domain.stage_calls import CONFIG, DATASET_FOLDER, FOLDERS, CallValues, expand
from app.domain.training_types import TYPES, InferenceForm
from app.executor.runs.job_spec import JobSpec, RunnerCall
from app.registry.datasets.files import IMAGES_FOLDER, held_out_parts
from app.store.tables import JobRow

DEFAULT_DTYPE = "bfloat16"
DTYPES = frozenset({"float16", "float32", "bfloat16"})


@dataclass(frozen=True)
class Inputs:
    """Paths that a stage's arguments name, absolute."""

    base_model: Path | None
    dataset: Path | None
    model: Path | None
    model_name: str
    output: Path
    validation: Path | None = None


@dataclass(frozen=True)
class Folders:
    """Where an attempt runs: the script root, its own folder, and the folder that its process starts in."""

    script_root: Path
    run: Path
    working: Path


@dataclass(frozen=True)
class Called:
    """What a stage is called with. `config`: content of the configuration file, None if there is none.

    `notes` say what was kept from the script or left out.
    """

    arguments: Sequence[str]
    config: Mapping[str, Any] | Sequence[Any] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[Violation] = ()


def dataset_folder(dataset: Path, folders: Folders) -> Path:
    """Return the folder of a data set for scripts that take one: its own if it has pictures, else one of the job.

    Files of data sets lie side by side: a script that takes their folder would learn from all of them. All attempts
    have the same one, since libraries remember prepared rows by the path that they came from.
    """
    own = dataset.parent
    has_pictures = own != folders.script_root.parent / "datasets" and (own / IMAGES_FOLDER).is_dir()
    return own if has_pictures else folders.run.parent / "dataset"


def dataset_links(spec: JobSpec, inputs: Inputs, folders: Folders) -> dict[Path, Path]:
    """Return the files of the folder that is made for a stage which takes one, and what each is a link to.

    Their names are those by which loaders know the splits.
    """
    if inputs.dataset is None or DATASET_FOLDER not in spec.call.platform_values:
        return {}
    folder = dataset_folder(inputs.dataset, folders)
    if folder == inputs.dataset.parent:
        return {}
    links = {folder / "train.jsonl": inputs.dataset}
    own = inputs.dataset.parent
    parts = held_out_parts(own) if own != folders.script_root.parent / "datasets" else {}
    parts |= {"valid": inputs.validation} if inputs.validation is not None else {}
    return links | {folder / f"{part}.jsonl": file for part, file in parts.items()}


class ParametersLost(Exception):
    """Parameters of a job would reach nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(", ".join(names))


def call_stage(job: JobRow, spec: JobSpec, inputs: Inputs, folders: Folders) -> Called:
    """Return what the stage is called with: as the method says, else as DeepExtension calls scripts.

    Raises `ArgumentTooLong`, `ArgumentNotText`, and `ParametersLost` if a parameter would reach nothing.
    """
    if spec.runner_call is not None:
        return _call_of_runner(spec, spec.runner_call, inputs, folders)
    settings = spec.deployment.settings if spec.deployment is not None else {}
    values = CallValues(
        platform=_platform_values(job, spec, inputs, folders),
        parameters={**settings, **_with_paths(spec.effective, spec, folders, relative_to=None)},
        forms=spec.forms,
        false_as=spec.false_as,
    )
    expanded = expand(spec.call, values)
    if lost := [name for name in expanded.unplaced if name in spec.effective]:
        raise ParametersLost(lost)
    left_out = [Violation("", "call_part_left_out", {"part": shown(part)}) for part in expanded.left_out]
    if expanded.arguments is not None:
        return Called(expanded.arguments, expanded.config, expanded.env, left_out)
    arguments, kept = _platform_arguments(job, spec, inputs, folders)
    return Called(arguments, expanded.config, expanded.env, [*kept, *left_out])


def _call_of_runner(spec: JobSpec, call: RunnerCall, inputs: Inputs, folders: Folders) -> Called:
    """Return what a call of DeepExtension's backend runs its script with: what the method says, else what it said."""
    platform = {**call.platform, **_folder_values(spec, inputs, folders)}
    values = CallValues(platform=platform, parameters=call.parameters, forms=spec.forms, false_as=spec.false_as)
    expanded = expand(spec.call, values)
    arguments = list(call.arguments) if expanded.arguments is None else expanded.arguments
    left_out = [Violation("", "call_part_left_out", {"part": shown(part)}) for part in expanded.left_out]
    return Called(arguments, expanded.config, expanded.env, left_out)


def _platform_arguments(
    job: JobRow, spec: JobSpec, inputs: Inputs, folders: Folders
) -> tuple[list[str], list[Violation]]:
    """Return the arguments of the contract, with paths relative to where the stage runs, and what it does not get."""
    parameters = _with_paths(spec.effective, spec, folders, relative_to=folders.working)
    placed = spec.model_copy(update={"effective": parameters})
    arguments = _arguments(job, placed, _Paths(inputs, folders, relative=True))
    kept = set(spec.withheld)
    if spec.declared_only and spec.declared is not None:
        kept |= {name for name, value in arguments.items() if name not in spec.declared and value is not None}
    render = render_pairs if _argument_style(job, spec) is ArgumentStyle.PAIRS else render_equals
    passed = {name: value for name, value in arguments.items() if name not in kept}
    names = ", ".join(name for name in arguments if name in kept)
    notes = [Violation("", "call_arguments_kept", {"names": names})] if names else []
    return render(passed, false_as=spec.false_as, forms=spec.forms), notes


def _platform_values(job: JobRow, spec: JobSpec, inputs: Inputs, folders: Folders) -> dict[str, Any]:
    """Return what the platform's placeholders stand for."""
    without = spec.model_copy(update={"effective": {}})
    paths = _Paths(inputs, folders, relative=False)
    values = _arguments(job, without, paths)
    if job.kind is JobKind.SAVING:
        values = {**_training(job, without, paths), **values}
    return values | _folder_values(spec, inputs, folders)


def _folder_values(spec: JobSpec, inputs: Inputs, folders: Folders) -> dict[str, Any]:
    """Return the values that only the attempt knows."""
    found = {DATASET_FOLDER: dataset_folder(inputs.dataset, folders) if inputs.dataset is not None else None}
    found |= dict(zip(FOLDERS, (folders.script_root, folders.run), strict=True))
    found |= {CONFIG: folders.run / spec.call.config.name} if spec.call.config is not None else {}
    return {name: str(path) for name, path in found.items() if path is not None}


def _with_paths(
    parameters: Mapping[str, Any], spec: JobSpec, folders: Folders, *, relative_to: Path | None
) -> dict[str, Any]:
    """Return the parameters, those that the platform made of a data set or a model with paths that hold there.

    They are kept relative to the script root; `relative_to` None makes them absolute.
    """
    placed = dict(parameters)
    for name in spec.named_paths:
        if (value := placed.get(name)) is not None:
            path = os.path.normpath(folders.script_root / value)
            placed[name] = path if relative_to is None else os.path.relpath(path, relative_to)
    return placed


def _argument_style(job: JobRow, spec: JobSpec) -> ArgumentStyle | None:
    rule = KINDS[job.kind]
    if rule.is_inference and TYPES[spec.training_type].generates_images:
        return ArgumentStyle.PAIRS
    return rule.argument_style


class _Paths:
    """The inputs as arguments name them: relative to where the stage runs, as the contract has them, or absolute."""

    def __init__(self, inputs: Inputs, folders: Folders, *, relative: bool) -> None:
        self._working = folders.working if relative else None
        self.base_model = self._shown(inputs.base_model)
        self.dataset = self._shown(inputs.dataset)
        self.model = self._shown(inputs.model)
        self.output = self._shown(inputs.output)
        self.pictures = self._shown(folders.script_root.parent / "images")
        self.folder = str(inputs.model or inputs.base_model or "")
        self.model_name = inputs.model_name

    def _shown(self, path: Path | None) -> str:
        if path is None:
            return ""
        return str(path) if self._working is None else os.path.relpath(path, self._working)


def _arguments(job: JobRow, spec: JobSpec, inputs: _Paths) -> dict[str, Any]:
    match job.kind:
        case JobKind.TRAINING:
            return _training(job, spec, inputs)
        case JobKind.SAVING:
            from_base = not inputs.model
            return saving_arguments(
                train_id=job.id,
                seq=job.position + 1,
                save_path=inputs.output,
                base_path=inputs.base_model,
                adapter_path=inputs.model,
                dtype_str=_saving_dtype(spec),
                model_usage_type=spec.training_type,
                # the producing script of a path without `customized`
                training=_training(job, spec, inputs) if from_base or spec.effective else None,
            )
        case JobKind.DEPLOYMENT:
            return _deployment(job, spec, inputs)
        case JobKind.INFERENCE_CUSTOMIZED | JobKind.INFERENCE_COMPLETE:
            return _inference(job, spec, inputs)
        case JobKind.ENVIRONMENT | JobKind.BASE_MODEL | JobKind.PREVIEW:
            raise AssertionError(f"{job.kind} is no stage")
        case _:
            assert_never(job.kind)


def _saving_dtype(spec: JobSpec) -> str:
    """Saving keeps the precision of the base model: a smaller one would change the answers."""
    dtype = spec.base_model.dtype if spec.base_model else None
    return dtype if dtype in DTYPES else DEFAULT_DTYPE


def _training(job: JobRow, spec: JobSpec, inputs: _Paths) -> dict[str, Any]:
    return training_arguments(
        train_id=job.id,
        seq=job.position + 1,
        model_name=spec.base_model.name if spec.base_model else "",
        model_path=inputs.base_model,
        dataset_path=inputs.dataset,
        output_dir=inputs.output,
        parameters=spec.effective,
        train_file_name=spec.script.file if spec.script else "",
        train_env=job.environment,
    )


def _inference(job: JobRow, spec: JobSpec, inputs: _Paths) -> dict[str, Any]:
    question = spec.question
    assert question is not None
    complete = KINDS[job.kind].asks is ModelState.COMPLETE
    whole_model = inputs.model if complete else inputs.base_model
    form = TYPES[spec.training_type].inference_form
    match form:
        case InferenceForm.IMAGES:
            return picture_arguments(
                model_path=whole_model,
                lora_path="" if complete else inputs.model,
                prompt=question.prompt,
                negative_prompt=question.negative_prompt,
                output=f"{inputs.pictures}/{job.id}.png",
                batch_size=question.batch_size,
                aspect_ratio=question.aspect_ratio,
            )
        case InferenceForm.TEXT:
            return inference_arguments(
                model_id=_asked_id(job, spec),
                model_name=inputs.model_name,
                base_model_path=whole_model,
                prompt=question.prompt,
                session_id=question.session_id,
                max_length=question.max_length,
                max_context_tokens=question.max_context_tokens,
                temperature=question.temperature,
                top_p=question.top_p,
                top_k=question.top_k,
                model_type=spec.training_type,
                template=question.template,
                system_prompt=question.system_prompt,
                history=question.history,
                model_path=inputs.model,
                enable_thinking=question.enable_thinking,
                chat_template_kwargs=question.chat_template_kwargs,
            )
        case _:
            assert_never(form)


def _asked_id(job: JobRow, spec: JobSpec) -> str:
    """Return the id of the model that answers."""
    if spec.comparison is not None and spec.comparison.base and spec.base_model is not None:
        return spec.base_model.id
    return job.model_id or ""


def _deployment(job: JobRow, spec: JobSpec, inputs: _Paths) -> dict[str, Any]:
    deployment = spec.deployment
    assert deployment is not None
    return deployment_arguments(
        train_id=job.id,
        seq=job.position + 1,
        folder_path=inputs.folder,
        server_url=deployment.url,
        model_name=online_name(
            source_name=inputs.model_name, deployment_id=UUID(job.id), quantization=deployment.quantize
        ),
        quantize=deployment.quantize,
        template=deployment.template,
        base_path=inputs.base_model,
        actual_path=inputs.model,
        system=deployment.system,
        parameters=deployment.parameters,
        more={**deployment.settings, **spec.effective},
    )
