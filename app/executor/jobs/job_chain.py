"""The jobs of a submission: the stages that run, in their order, and what each of them is started with."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

from app.domain.allow_lists import AllowList
from app.domain.demand import DEFAULT_QUEUE, Resources
from app.domain.enums import JobKind, TrainingType
from app.domain.errors import AppError, Violation
from app.domain.kinds import KINDS, Stage
from app.domain.launchers import (
    DIVIDING,
    SERVER_PARAMETER,
    STRATEGY_PARAMETER,
    AnswerServer,
    Strategy,
    answer_server,
    strategy_of,
)
from app.domain.lifecycle import chain, runnable_stages, source_state, trains
from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.domain.projects import ProjectLimits
from app.domain.secret_references import broken_references, references
from app.domain.stage_calls import stage_call
from app.executor.jobs.requests import JobSubmit
from app.executor.jobs.stage_parameters import CheckedParameters
from app.executor.jobs.submission_inputs import Inputs, permits
from app.executor.runs.job_spec import Deployment, JobSpec, PinnedScript
from app.presets.catalogue import OLLAMA_SCRIPT, script_path
from app.registry.methods.pins import PinnedFile
from app.registry.methods.record import Method
from app.registry.scripts.root import digest_of
from app.store import jobs as store
from app.store.allow_lists import of_node
from app.store.tables import JobRow, NodeRow


def wanted_stages(method: Method, request: JobSubmit) -> tuple[Sequence[Stage], list[Violation]]:
    """Return the stages to run, in order."""
    definition = method.definition
    assert definition.lifecycle is not None
    if (request.through is None) == (request.stage is None):
        return (), [Violation("/through", "through_or_stage", {})]
    if request.through is not None:
        if request.model is not None:
            return (), [Violation("/model", "model_without_stage", {})]
        with_training = definition.stage_config(JobKind.TRAINING) is not None
        try:
            return chain(definition.lifecycle, request.through, with_training=with_training), []
        except AppError as error:
            return (), list(error.violations())
    stages = [stage for stage in runnable_stages(definition) if KINDS[stage].submitted_alone]
    stage = next((stage for stage in stages if stage == request.stage), None)
    if stage is None:
        params = {"stage": shown(request.stage or ""), "stages": ", ".join(stages)}
        return (), [Violation("/stage", "stage_not_runnable", params)]
    source = source_state(definition.lifecycle, stage)
    if source is not None and request.model is None:
        return (), [Violation("/model", "model_needed", {"stage": stage, "state": source})]
    if source is None and request.model is not None:
        return (), [Violation("/model", "model_not_taken", {"stage": stage})]
    return (stage,), []


def environments_of(method: Method, stages: Sequence[Stage]) -> set[str]:
    return {method.environment(stage) or BASE_ENVIRONMENT for stage in stages}


def job_chain(
    method: Method,
    request: JobSubmit,
    stages: Sequence[Stage],
    inputs: Inputs,
    checked: CheckedParameters,
    deployment: Deployment | None,
    *,
    files: Mapping[Stage, Mapping[str, PinnedFile]],
    now: datetime,
) -> list[JobRow]:
    """Return the queued jobs of the stages; each waits for the one before it. `files`: those that parameters name."""
    jobs: list[JobRow] = []
    for position, stage in enumerate(stages):
        spec = JobSpec(
            training_type=TrainingType(method.definition.training_type or ""),
            technique=method.definition.technique,
            script=_pinned(method, stage),
            call=stage_call(method.definition, stage),
            launcher=method.definition.launcher(stage),
            output=method.definition.output(stage),
            strategy=strategy(method, stage, checked, stage_resources(request, method, stage)),
            server=server(stage, checked),
            declared=checked.declared(stage),
            declared_only=method.definition.arguments.declared_only or checked.refuses_unknown(stage),
            withheld=checked.withheld(stage),
            false_as=method.definition.arguments.false_as,
            forms=checked.forms(stage),
            base_model=inputs.base_model,
            permits=permits(method, stage, inputs.allowed),
            dataset=inputs.dataset,
            validation_dataset=inputs.validation_dataset,
            reward_model=inputs.judge,
            effective=checked.effective(stage),
            files=named_files(files[stage]),
            named_paths=checked.named_paths.get(stage, ()),
            **checked.needed_of_node(stage),
            deployment=deployment if stage is JobKind.DEPLOYMENT else None,
            wait=request.wait,
        )
        jobs.append(
            store.new_job(
                kind=stage,
                name=request.name or method.name,
                environment=method.environment(stage) or BASE_ENVIRONMENT,
                launch=spec.document(),
                now=now,
                position=position,
                method_id=method.id,
                method_name=method.name,
                base_model_id=inputs.base_model.id if inputs.base_model else None,
                dataset_id=inputs.dataset.id if inputs.dataset else None,
                model_id=_model_of(stage, inputs),
                parameters=checked.given(stage),
                priority=request.priority,
                queue=request.queue,
                submitted_by=request.user,
                resources=stage_resources(request, method, stage).document(),
                retry=request.retry.document(),
                limits=request.limits.document(),
            )
        )
    store.link(jobs)
    return jobs


def within_limits(request: JobSubmit, limits: ProjectLimits) -> tuple[JobSubmit, list[Violation]]:
    """Return the request for the project's queue, if it has one, and whether it names another."""
    if limits.queue is None:
        return request, []
    wrong = request.queue not in (DEFAULT_QUEUE, limits.queue)
    found = [Violation("/queue", "project_queue", {"queue": limits.queue})] if wrong else []
    return request.model_copy(update={"queue": limits.queue}), found


def accelerator_violations(jobs: Sequence[JobRow], limits: ProjectLimits) -> list[Violation]:
    """Return whether a job takes more accelerators than one of the project may."""
    most = limits.accelerators_per_job
    if most is None or all(store.demand_of(job).most_accelerators <= most for job in jobs):
        return []
    return [Violation("/resources/accelerators", "project_accelerators_limit", {"limit": most})]


def secret_violations(jobs: Sequence[JobRow], secrets: Collection[str]) -> list[Violation]:
    """Return the references to secrets that there are none of, and the texts that look like references and are none."""
    found: dict[tuple[str, str], Violation] = {}
    for job in jobs:
        for where, document in JobSpec.of(job).referring().items():
            part, _, name = where.partition(" ")
            at = pointer("parameters", name) if part == "parameters" and name in job.parameters else "/method"
            for secret in references(document):
                if secret not in secrets:
                    found[where, secret] = Violation(at, "unknown_secret", {"where": where, "secret": secret})
            for text in broken_references(document):
                found[where, text] = Violation(at, "secret_reference_broken", {"where": where})
    return list(found.values())


def allowed_violations(
    jobs: Sequence[JobRow], rules: Mapping[str, AllowList], nodes: Sequence[NodeRow], *, at: str
) -> list[Violation]:
    """Return which environments a job may not use, and which jobs no living node may run."""
    living = [row for row in nodes if row.dead_at is None]
    found: dict[tuple[str, str], Violation] = {}
    for job in jobs:
        beside = JobSpec.of(job).server
        for environment in [job.environment, *([beside.environment] if beside is not None else [])]:
            rule = rules.get(environment, AllowList())
            if not _permits(rule, job, environment):
                params = {"environment": environment, "stage": job.kind.value}
                found[job.kind, environment] = Violation(at, "environment_not_allowed", params)
        if living and not any(_permits(of_node(row), job, job.environment) for row in living):
            params = {"stage": job.kind.value, "environment": job.environment}
            found[job.kind, ""] = Violation(at, "no_node_allows", params)
    return list(found.values())


def _permits(allowed: AllowList, job: JobRow, environment: str) -> bool:
    return allowed.permits(job.kind, method_id=job.method_id, project_id=job.project_id, environment=environment)


def named_files(pinned: Mapping[str, PinnedFile]) -> dict[str, PinnedScript]:
    """Return the files that parameters name as a job's specification has them."""
    return {name: PinnedScript(**asdict(one)) for name, one in pinned.items()}


def stage_resources(request: JobSubmit, method: Method, stage: Stage) -> Resources:
    """Return what one stage of the submission asks for.

    Number and memory of accelerators are for the stages that produce: training, and saving on a path without
    `customized`. The others of a chain get the labels; a single stage gets everything.
    """
    lifecycle = method.definition.lifecycle or ()
    if trains(lifecycle, stage) or request.stage is not None:
        return request.resources
    return Resources(labels=request.resources.labels)


def strategy(method: Method, stage: Stage, checked: CheckedParameters, resources: Resources) -> Strategy | None:
    """Return how the processes of the stage share a model, if its script leaves that to a parameter."""
    asked = checked.values(stage).get(STRATEGY_PARAMETER) if checked.declares(stage, STRATEGY_PARAMETER) else None
    beside = server(stage, checked)
    accelerators = (resources.accelerators or 0) - (beside.accelerators if beside is not None else 0)
    return strategy_of(method.definition.launcher(stage), asked, max(0, accelerators))


def server(stage: Stage, checked: CheckedParameters) -> AnswerServer | None:
    """Return the server that the stage starts, if its script knows that parameter."""
    return answer_server(checked.values(stage)) if checked.declares(stage, SERVER_PARAMETER) else None


def server_violations(stages: Sequence[Stage], checked: CheckedParameters, known: Collection[str]) -> list[Violation]:
    """Refuse a server from an environment that nobody knows."""
    beside = {stage: one.environment for stage in stages if (one := server(stage, checked)) is not None}
    return [
        Violation("/parameters/vllm_environment", "server_environment_not_known", {"environment": name, "stage": stage})
        for stage, name in beside.items()
        if name not in known
    ]


def strategy_violations(jobs: Sequence[JobRow]) -> list[Violation]:
    """Refuse to divide a model among fewer than two processes."""
    wrong = []
    for job in jobs:
        spec = JobSpec.of(job)
        left = spec.server.accelerators if spec.server is not None else 0
        processes = (store.demand_of(job).resources.accelerators or spec.launcher.processes or 1) - left
        if spec.strategy in DIVIDING and processes < 2:
            params = {"strategy": spec.strategy, "name": STRATEGY_PARAMETER}
            wrong.append(Violation("/resources/accelerators", "strategy_needs_accelerators", params))
    return wrong


def _pinned(method: Method, stage: Stage) -> PinnedScript | None:
    """Return what the stage runs, None if that is a module of the environment."""
    pinned = method.files.get(stage)
    if pinned is not None:
        return PinnedScript(**asdict(pinned))
    if stage_call(method.definition, stage).module is not None:
        return None
    # deployment to a configured target is done by a script of the product
    digest = digest_of(script_path(OLLAMA_SCRIPT).read_bytes())
    return PinnedScript(file=OLLAMA_SCRIPT, sha256=digest.sha256, size=digest.size, shipped=True)


def _model_of(stage: Stage, inputs: Inputs) -> str | None:
    """Return the model that the stage works on, or that a training goes on from."""
    model = inputs.start if stage is JobKind.TRAINING else inputs.model
    return model.id if model is not None else None
