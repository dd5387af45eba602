"""What a submission works on: its base model, data sets and model, checked as they are now. No statement is run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.domain.allow_lists import AllowList
from app.domain.enums import ModelState, TrainingType
from app.domain.errors import AppError, InvalidRequest, Violation
from app.domain.kinds import Stage
from app.domain.lifecycle import producing_stage
from app.domain.projects import NO_LIMITS, ProjectLimits
from app.executor.jobs.base_model_builds import must_be_made
from app.executor.jobs.data_check import Data, HeldOut, shipped_manifest
from app.executor.jobs.requests import JobSubmit
from app.executor.jobs.stage_parameters import (
    REWARD_MODEL,
    REWARD_PATH,
    START,
    START_PATH,
    VALIDATION_DATASET,
    Validation,
)
from app.executor.runs.job_spec import Named
from app.presets.shared.helpers.deepe_loading import CUSTOM_CODE, PICKLED_WEIGHTS
from app.registry.base_models.card import BaseModelCard, BaseModelKind
from app.registry.base_models.findings import (
    NOTHING_ALLOWED,
    Finding,
    LoadingPermission,
    Severity,
    findings,
    loading_violations,
)
from app.registry.base_models.service import BaseModels
from app.registry.datasets.check import columns_of
from app.registry.datasets.files import IMAGES_FOLDER, Inspection, held_out_parts
from app.registry.datasets.mixes import Mix
from app.registry.datasets.service import Datasets
from app.registry.environments.described_options import Described
from app.registry.methods.readiness_matrix import Matrix
from app.registry.methods.record import Method
from app.registry.models.check import ADAPTER_CONFIG, CONFIG, MAX_JSON_BYTES
from app.registry.models.files import UnusableFile, read_json_object
from app.registry.models.tokenizer_files import read_tokenizer
from app.store.home import Home
from app.store.tables import BaseModelRow, DatasetRow, DeployTargetRow, JobRow, ModelRow


@dataclass(frozen=True)
class Known:
    """The rows that a submission rests on, the stages that it asks for and what is wrong with those."""

    method: Method
    base_model: BaseModelRow | None
    dataset: DatasetRow | None
    model: ModelRow | None
    start: ModelRow | None
    """Model that a training goes on from."""
    judge: ModelRow | None
    """Reward model of a training."""
    stages: Sequence[Stage]
    violations: Sequence[Violation]
    target: DeployTargetRow | None
    environments: frozenset[str]
    validation: DatasetRow | None
    mix: Mix | None
    """Of the data sets that the request names, if it names several."""
    nodes: Matrix
    described: Described
    secrets: frozenset[str] = frozenset()
    """Names of the secrets that there are."""
    rules: Mapping[str, AllowList] = field(default_factory=dict)
    """Allow-lists of environments."""
    limits: ProjectLimits = NO_LIMITS
    """Of the project."""
    measured: Sequence[JobRow] = ()
    """Trainings of the method and the base model whose memory was measured, newest first."""


@dataclass(frozen=True)
class Inputs:
    """The rows that the names of a submission refer to."""

    base_model: Named | None
    dataset: Named | None
    model: ModelRow | None
    data: Data | None
    violations: Sequence[Violation]
    inspections: Sequence[tuple[str, Inspection]] = ()
    validation_dataset: Named | None = None
    validation: Validation | None = None
    base_unmade: bool = False
    card: BaseModelCard | None = None
    """Of the base model's folder as it is now."""
    warnings: Sequence[Violation] = ()
    allowed: LoadingPermission = NOTHING_ALLOWED
    start: ModelRow | None = None
    judge: Named | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Those that name the folders of models to the training script."""


class InputCheck:
    """Checks inputs as they lie on disk. Everything here blocks: call it in a thread."""

    def __init__(self, *, home: Home, datasets: Datasets, base_models: BaseModels) -> None:
        self._home = home
        self._datasets = datasets
        self._base_models = base_models

    def check(self, request: JobSubmit, known: Known, needed: ModelState | None) -> Inputs:
        """Return what the request's names refer to, and everything that is wrong with it."""
        if known.model is not None:
            return self._of_model(request, known, known.model, needed)
        if request.stage is not None and request.model is not None:
            unknown = Violation("/model", "unknown_model", {"model": request.model})
            return Inputs(base_model=None, dataset=None, model=None, data=None, violations=[unknown])
        found: list[Violation] = []
        base, data = known.base_model, known.dataset
        if request.base_model is None:
            found.append(Violation("/base_model", "base_model_needed", {}))
        elif base is None:
            found.append(Violation("/base_model", "unknown_base_model", {"base_model": request.base_model}))
        unplaced = known.mix.new if known.mix is not None else None
        if known.mix is not None:
            if known.mix.error is not None:
                found += known.mix.error.violations()
            elif data is None:  # deleted since it was found
                gone = known.mix.row.name if known.mix.row is not None else ""
                found.append(Violation("/datasets", "unknown_dataset", {"dataset": gone}))
        elif request.dataset is None:
            found.append(Violation("/dataset", "dataset_needed", {}))
        elif data is None:
            found.append(Violation("/dataset", "unknown_dataset", {"dataset": request.dataset}))
        unmade = base is not None and must_be_made(base, base.path, self._home)
        if base is not None and not unmade and not self._exists(base.path):
            found.append(Violation("/base_model", "files_missing", {"name": base.name, "path": base.path}))
            base = None
        if data is not None and unplaced is None and not self._exists(data.path):
            found.append(Violation("/dataset", "files_missing", {"name": data.name, "path": data.path}))
            data = None
        scored = known.validation
        if request.validation_dataset is not None and scored is None:
            found.append(Violation(VALIDATION_DATASET, "unknown_dataset", {"dataset": request.validation_dataset}))
        if scored is not None and not self._exists(scored.path):
            params = {"name": scored.name, "path": scored.path}
            found.append(Violation(VALIDATION_DATASET, "files_missing", params))
            scored = None
        card, wrong, warnings = self._judge_base_model(None if unmade else base, known)
        found += wrong
        found += self._start_violations(request, known)
        found += self._judge_violations(request, known.judge)
        found += self._loading_violations(known, (known.start, START), (known.judge, REWARD_MODEL))
        # large files take long to check again, so what was not touched since is not read
        inspection = self._datasets.current(data) if data is not None and unplaced is None else None
        scored_now = self._datasets.current(scored) if scored is not None else None
        edited = [(data, inspection), (scored, scored_now)]
        return Inputs(
            base_model=_named_base(base, card) if base is not None else None,
            dataset=self._named_data(data, inspection if unplaced is None else unplaced.placed) if data else None,
            model=None,
            data=self._mixed_data(data, inspection, known.mix) if data is not None else None,
            violations=found,
            inspections=[(row.id, now) for row, now in edited if row is not None and now is not None],
            validation_dataset=self._named_data(scored, scored_now) if scored is not None else None,
            validation=self.validation_of(scored, scored_now) if scored is not None else None,
            base_unmade=unmade,
            card=card,
            warnings=warnings,
            allowed=LoadingPermission.of(known.base_model),
            start=known.start,
            judge=_named_model(known.judge),
            model_arguments=self.model_arguments(known.start, _named_model(known.judge)),
        )

    def _judge_base_model(
        self, row: BaseModelRow | None, known: Known
    ) -> tuple[BaseModelCard | None, list[Violation], list[Violation]]:
        """Return the card of the folder as it is now, what refuses a training of the method's type, what is unusual."""
        if row is None:
            return None, [], []
        try:
            card = self._base_models.current_card(row)
        except InvalidRequest as error:
            return None, list(error.violations()), []
        found = base_model_findings(card, row, known.method, own_script=not _runs_shipped(known))
        by_severity = {severity: [one.violation for one in found if one.severity is severity] for severity in Severity}
        return card, by_severity[Severity.ERROR], by_severity[Severity.WARNING]

    def _exists(self, path: str) -> bool:
        return self._home.absolute(path).exists()

    def _of_model(self, request: JobSubmit, known: Known, model: ModelRow, needed: ModelState | None) -> Inputs:
        """Resolve the model of a single stage, with the base model and data set that it was made from."""
        base_model = known.base_model
        wrong: list[Violation] = []
        if request.validation_dataset is not None:
            wrong.append(Violation(VALIDATION_DATASET, "model_keeps_inputs", {}))
        if request.adapter_name_or_path is not None:
            wrong.append(Violation(START, "model_keeps_inputs", {}))
        if request.reward_model is not None:
            wrong.append(Violation(REWARD_MODEL, "model_keeps_inputs", {}))
        if request.datasets is not None:
            wrong.append(Violation("/datasets", "model_keeps_inputs", {}))
        if model.path is None:
            wrong.append(Violation("/model", "model_is_online", {"name": model.name}))
        elif not self._exists(model.path):
            wrong.append(Violation("/model", "files_missing", {"name": model.name, "path": model.path}))
        elif needed is not None and model.state is not needed:
            params = {"model": model.name, "state": model.state, "needed": needed}
            wrong.append(Violation("/model", "model_in_other_state", params))
        wrong += self._loading_violations(known, (model, "/model"))
        data = Named(
            id=model.dataset_id, name=model.dataset_name or "", path="datasets", digest=model.dataset_digest
        ) if model.dataset_id else None  # fmt: skip
        return Inputs(
            base_model=Named(
                id=model.base_model_id,
                name=model.base_model_name,
                path=model.base_model_path,
                dtype=base_model.card.get("dtype") if base_model else None,
            ),
            dataset=data,
            model=model,
            data=None,
            violations=wrong,
            allowed=LoadingPermission.of(base_model),
        )

    def _loading_violations(self, known: Known, *loaded: tuple[ModelRow | None, str]) -> list[Violation]:
        """Return why the platform's scripts do not load these models; scripts of users load what they want."""
        if not _runs_shipped(known):
            return []
        wrong = []
        for model, pointer in loaded:
            if model is not None:
                wrong += why_not_loaded(model, LoadingPermission.of(known.base_model), home=self._home, at=pointer)
        return wrong

    def model_arguments(self, start: ModelRow | None, judge: Named | None) -> dict[str, Any]:
        """Return the arguments that name the adapter to go on from and the reward model, relative to the scripts."""
        paths = {START_PATH: start.path if start else None, REWARD_PATH: judge.path if judge else None}
        return {
            name: os.path.relpath(self._home.absolute(path), self._home.scripts)
            for name, path in paths.items()
            if path is not None
        }

    def _start_violations(self, request: JobSubmit, known: Known) -> list[Violation]:
        """Return why a training cannot go on from the model that the request names."""
        model, base, name = known.start, known.base_model, request.adapter_name_or_path
        if name is None:
            return []
        if model is None:
            return [Violation(START, "unknown_model", {"model": name})]
        params = {"model": model.name, "state": model.state, "needed": ModelState.CUSTOMIZED}
        if model.state is not ModelState.CUSTOMIZED:
            return [Violation(START, "model_in_other_state", params)]
        if model.path is None or not self._exists(model.path):
            return [Violation(START, "files_missing", {"name": model.name, "path": model.path or ""})]
        kind, training_type = model.details.get("kind"), known.method.definition.training_type
        if kind != "adapter" or model.training_type != training_type:
            params = {"model": model.name, "kind": str(kind), "training_type": model.training_type}
            return [Violation(START, "adapter_of_other_kind", params)]
        if base is not None and model.base_model_id != base.id:
            params = {"model": model.name, "made_from": model.base_model_name, "base_model": base.name}
            return [Violation(START, "adapter_of_other_base", params)]
        return []

    def _judge_violations(self, request: JobSubmit, model: ModelRow | None) -> list[Violation]:
        """Return why the model that the request names cannot judge."""
        if request.reward_model is None:
            return []
        if model is None:
            return [Violation(REWARD_MODEL, "unknown_model", {"model": request.reward_model})]
        if model.path is None:
            return [Violation(REWARD_MODEL, "model_is_online", {"name": model.name})]
        if not self._exists(model.path):
            return [Violation(REWARD_MODEL, "files_missing", {"name": model.name, "path": model.path})]
        try:
            code = _why_no_judge(self._home.absolute(model.path))
        except UnusableFile as error:
            return [replace(error.violation, pointer=REWARD_MODEL)]
        return [] if code is None else [Violation(REWARD_MODEL, code, {"model": model.name})]

    def _named_data(self, row: DatasetRow, inspection: Inspection | None) -> Named:
        """Return the path of the JSONL file."""
        if inspection is not None:
            return Named(id=row.id, name=row.name, path=self._home.relative(inspection.jsonl), digest=inspection.digest)
        path = self._home.relative(self._datasets.jsonl_of(row))
        return Named(id=row.id, name=row.name, path=path, digest=row.digest)

    def data_of(self, row: DatasetRow, inspection: Inspection | None = None) -> Data:
        """Return the file of a data set and its columns, as they are now if it was read again."""
        if inspection is not None:
            data = Data(inspection.jsonl, inspection.digest, inspection.report.columns)
        else:
            jsonl = self._home.absolute(self._named_data(row, None).path)
            data = Data(jsonl, row.digest, columns_of(row.columns, row.rows, row.report))
        folder = self._home.absolute(row.path)
        if not folder.is_dir():
            return data
        images = folder / IMAGES_FOLDER
        pictures = os.path.relpath(images, self._home.scripts) if images.is_dir() else None
        return replace(data, pictures=pictures, held_out=self._held_out_of(folder))

    def _held_out_of(self, folder: Path) -> HeldOut | None:
        part = held_out_parts(folder).get("valid")
        if part is None:
            return None
        argument = os.path.relpath(part, self._home.scripts)
        try:
            found = self._datasets.part(folder, part)
        except AppError as error:  # it cannot be read, or is written to just now
            return HeldOut(argument, problems=error.violations())
        return HeldOut(argument, Data(found.jsonl, found.digest, found.report.columns), found.report.problems)

    def _mixed_data(self, row: DatasetRow, inspection: Inspection | None, mix: Mix | None) -> Data:
        """Return the rows of a data set, which may be a mix without a place, and the parts of a mix."""
        if mix is None:
            return self.data_of(row, inspection)
        data = self.data_of(row, inspection if mix.new is None else mix.new.inspection)
        return replace(data, parts=tuple(Data(part.jsonl, part.digest, part.columns) for part in mix.parts))

    def validation_of(self, row: DatasetRow, inspection: Inspection | None) -> Validation:
        """Return the rows for the score, and the argument that names their file."""
        data = self.data_of(row, inspection)
        return Validation(data, argument=os.path.relpath(data.jsonl, self._home.scripts))


def why_not_loaded(model: ModelRow, allowed: LoadingPermission, *, home: Home, at: str) -> list[Violation]:
    """Return why the platform's scripts do not load a model, and the base model below an adapter. Blocks."""
    folders = [model.path] if model.state is not ModelState.CUSTOMIZED else [model.path, model.base_model_path]
    names = (model.name, model.base_model_name)
    return [
        violation
        for path, name in zip(folders, names, strict=False)
        if path is not None and (folder := home.absolute(path)).is_dir()
        for violation in loading_violations(folder, allowed, model=name, base_model=model.base_model_name, at=at)
    ]


def permits(method: Method, stage: Stage, allowed: LoadingPermission) -> tuple[str, ...] | None:
    """Return what of a model's author the stage may run; None for a script of a user's, which is not asked.

    Our helpers in such a script run the model's code only where that is allowed.
    """
    if _is_shipped(method, stage):
        return allowed.permits
    return (PICKLED_WEIGHTS, CUSTOM_CODE) if allowed.custom_code else None


def _runs_shipped(known: Known) -> bool:
    """Say whether a script of the platform loads what the submission works on."""
    return any(_is_shipped(known.method, stage) for stage in known.stages)


def _is_shipped(method: Method, stage: Stage) -> bool:
    pinned = method.files.get(stage)
    return pinned is not None and (pinned.shipped or shipped_manifest(method, stage) is not None)


def base_model_findings(
    card: BaseModelCard, row: BaseModelRow, method: Method, *, own_script: bool = False
) -> Sequence[Finding]:
    """Return what follows from the card of a base model for a training with the method."""
    producer = producing_stage(method.definition.lifecycle or ())
    manifest = shipped_manifest(method, producer)
    if card.kind is BaseModelKind.DESCRIPTION and manifest is not None and manifest.needs_weights:
        return [Finding(Severity.ERROR, Violation("/base_model", "base_model_is_description", {"method": method.name}))]
    allowed = LoadingPermission.of(row)
    return findings(card, TrainingType(method.definition.training_type or ""), allowed, own_script=own_script)


def _why_no_judge(folder: Path) -> str | None:
    """Return the code of why a model gives no rewards: one number for a conversation. Raises `UnusableFile`."""
    names = frozenset(entry.name for entry in folder.iterdir() if entry.is_file())
    file = ADAPTER_CONFIG if ADAPTER_CONFIG in names else CONFIG
    config = read_json_object(folder / file, max_bytes=MAX_JSON_BYTES) if file in names else {}
    kind, outputs = str((config.get("architectures") or [""])[0]), config.get("id2label")
    is_classifier = kind.endswith("ForSequenceClassification") and isinstance(outputs, dict) and len(outputs) == 1
    if config.get("task_type") != "SEQ_CLS" and not is_classifier:
        return "reward_model_is_none"
    return None if read_tokenizer(folder, names, config).chat_template else "reward_model_without_template"


def _named_model(row: ModelRow | None) -> Named | None:
    return None if row is None or row.path is None else Named(id=row.id, name=row.name, path=row.path)


def _named_base(row: BaseModelRow, card: BaseModelCard | None) -> Named:
    return Named(id=row.id, name=row.name, path=row.path, dtype=card.dtype if card else row.card.get("dtype"))
