"""Show what would run for a stage before anything runs: made by the code that launches it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.domain.errors import AppError, InvalidRequest, Violation
from app.domain.kinds import KINDS, STAGES, Stage
from app.domain.launchers import GROUP_KINDS
from app.domain.plain_text import shown
from app.executor.attempts.stage_arguments import Inputs, ParametersLost
from app.executor.attempts.stage_process import ConfigNotWritable, Place, StageProcess, stage_process
from app.executor.environments.activation import interpreter
from app.executor.jobs.inference_requests import Conversation, InferenceRequests, Message, Received
from app.executor.jobs.requests import DeploymentOptions, JobSubmit
from app.executor.jobs.submission import Submissions
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.run_folder import RunFolder
from app.registry.environments.on_nodes import AS_REPORTED
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.runs import script_to_run
from app.store import methods as method_store
from app.store.home import Home
from app.store.models import get_model
from app.store.nodes import all_nodes
from app.store.session import Database
from app.store.tables import JobRow, ModelRow, NodeRow

NO_JOB: Final = "00000000-0000-0000-0000-000000000000"
"""Stands for the id that the job will have."""
_EARLIER_JOB: Final = "11111111-1111-1111-1111-111111111111"
"""Stands for the id of the job before it, whose model it works on."""
_QUESTION: Final = "Hello"


@dataclass(frozen=True)
class WantedCommand:
    """A stage of a method, and what a job of it would be given."""

    method: str
    stage: str
    base_model: str | None = None
    dataset: str | None = None
    model: str | None = None
    parameters: str | None = None
    """A JSON object."""
    accelerators: int | None = None


@dataclass(frozen=True)
class ShownCommand:
    """What would run, and the decisions that led to it."""

    stage: Stage
    environment: str
    process: StageProcess
    notes: Sequence[Violation]


class StageCommands:
    """Makes commands of stages without running them."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        files: MethodFiles,
        submissions: Submissions,
        questions: InferenceRequests,
        redis_url: str | None,
        runner_port: int | None,
        grace_seconds: float,
    ) -> None:
        self._database = database
        self._home = home
        self._files = files
        self._submissions = submissions
        self._questions = questions
        self._redis_url = redis_url
        self._runner = {"TRAINING_START_PORT": str(runner_port)} if runner_port is not None else {}
        self._grace_seconds = grace_seconds

    async def show(self, wanted: WantedCommand) -> ShownCommand:
        """Return what would run. Raise what a submit would raise, save that no node can run it."""
        stage = next((one for one in STAGES if one == wanted.stage), None)
        if stage is None:
            params = {"stage": shown(wanted.stage), "stages": ", ".join(STAGES)}
            raise InvalidRequest([Violation("?stage", "stage_not_runnable", params)])
        async with self._database.reading() as session:
            method = await method_store.get(session, wanted.method)
        job, notes = await self._planned(stage, wanted, method.id)
        async with self._database.reading() as session:
            model = None if wanted.model is None else await get_model(session, wanted.model)
            prefix = _prefix(await all_nodes(session), job.environment)
        if prefix is None:
            notes = [*notes, Violation("", "command_without_environment", {"environment": job.environment})]
        process = await asyncio.to_thread(self._process, job, model, prefix or Path(f"<{job.environment}>"))
        return ShownCommand(stage, job.environment, process, [*notes, *process.notes])

    async def _planned(self, stage: Stage, wanted: WantedCommand, method_id: str) -> tuple[JobRow, list[Violation]]:
        """Return the job that a submit would write, or a question would."""
        if KINDS[stage].is_inference:
            return await self._question(stage, wanted, method_id), []
        request = JobSubmit(
            method=method_id,
            base_model=wanted.base_model,
            dataset=wanted.dataset,
            model=wanted.model,
            parameters=_parameters(wanted.parameters),
            through=None if wanted.model is not None else KINDS[stage].produces,
            stage=stage if wanted.model is not None else None,
            deployment=DeploymentOptions(),
            wait=True,  # where it could run is another question
        )
        if wanted.accelerators is not None:
            resources = request.resources.model_copy(update={"accelerators": wanted.accelerators})
            request = request.model_copy(update={"resources": resources})
        plan = await self._submissions.plan(request, submits=False)
        if plan.error is not None:
            raise _of_query(plan.error)
        job = next((job for job in plan.jobs if job.kind is stage), None)
        if job is None:
            params = {"stage": stage, "stages": ", ".join(one.kind for one in plan.jobs)}
            raise InvalidRequest([Violation("?stage", "stage_not_runnable", params)])
        return job, list(plan.warnings)

    async def _question(self, stage: Stage, wanted: WantedCommand, method_id: str) -> JobRow:
        if wanted.parameters:
            raise InvalidRequest([Violation("?parameters", "question_without_parameters", {"stage": stage})])
        if wanted.model is None:
            raise InvalidRequest([Violation("?model", "model_needed", {"stage": stage, "state": KINDS[stage].asks})])
        conversation = Conversation([Message("user", _QUESTION)], None, {})
        job = await self._questions.plan(wanted.model, Received(NO_JOB, conversation), submits=False)
        if job.kind is not stage or job.method_id != method_id:
            raise InvalidRequest([Violation("?model", "model_of_other_stage", {"model": wanted.model, "stage": stage})])
        return job

    def _process(self, job: JobRow, model: ModelRow | None, prefix: Path) -> StageProcess:
        """Return the process as a node would start it; blocks."""
        job.id, spec = NO_JOB, JobSpec.of(job)
        run = RunFolder(self._home.run_folder(job.id, 1))
        script = None if spec.script is None else script_to_run(self._files, PinnedFile(**spec.script.model_dump()))
        accelerators = (job.resources or {}).get("accelerators")
        if accelerators is None:
            accelerators = spec.launcher.processes or 0 if spec.launcher.kind in GROUP_KINDS else 0
        place = Place(
            python=interpreter(prefix),
            script=script,
            run=run,
            script_root=self._home.scripts,
            output=run.output,
            accelerators=accelerators,
            grace_seconds=self._grace_seconds,
            redis_url=self._redis_url,
            variables=self._runner,
        )
        try:
            return stage_process(job, spec, self._inputs(job, spec, model, run), place)
        except ParametersLost as error:
            params = {"name": ", ".join(error.names), "places": "-"}
            raise InvalidRequest([Violation("?parameters", "parameter_without_place", params)]) from error
        except ConfigNotWritable as error:
            raise InvalidRequest([Violation("?parameters", "config_not_writable", {"detail": str(error)})]) from error

    def _inputs(self, job: JobRow, spec: JobSpec, model: ModelRow | None, run: RunFolder) -> Inputs:
        """Return the paths of the job; a model that the job before it would make lies where that would write it."""
        path = self._home.absolute(model.path) if model is not None and model.path else None
        if path is None and job.position > 0:
            path = RunFolder(self._home.run_folder(_EARLIER_JOB, 1)).output
        return Inputs(
            base_model=self._home.absolute(spec.base_model.path) if spec.base_model else None,
            dataset=self._home.absolute(spec.dataset.path) if spec.dataset else None,
            model=path,
            model_name=model.name if model is not None else "",
            output=run.output,
            validation=self._home.absolute(spec.validation_dataset.path) if spec.validation_dataset else None,
        )


def _parameters(text: str | None) -> dict[str, Any]:
    """Return the parameters that a query has as text."""
    try:
        parameters = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise InvalidRequest([Violation("?parameters", "parameters_not_an_object", {})])
    return parameters


def _of_query(error: AppError) -> AppError:
    """Return the error with pointers to parameters of the query."""
    if not isinstance(error, InvalidRequest):
        return error
    found = error.violations()
    at = [f"?{one.pointer[1:]}" if one.pointer.count("/") == 1 else one.pointer for one in found]
    return InvalidRequest([replace(one, pointer=pointer) for one, pointer in zip(found, at, strict=True)])


def _prefix(nodes: Sequence[NodeRow], environment: str) -> Path | None:
    """Return where a node has the environment."""
    reports = (AS_REPORTED.on(node, [environment])[0].report.prefix for node in nodes)
    return next((Path(prefix) for prefix in reports if prefix is not None), None)
