"""The model that a job made: its name, its row, its card."""

from dataclasses import asdict
from datetime import datetime
from uuid import UUID

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import ModelState
from app.domain.kinds import KINDS
from app.domain.names import complete_name, online_name, produced_name
from app.executor.attempts.artifacts import ArtifactKind, ResultManifest
from app.executor.attempts.model_card import ModelCard, Score, render, with_card, write_model_card
from app.executor.runs.evaluations import Reached
from app.executor.runs.job_spec import JobSpec
from app.store import models
from app.store.home import Home
from app.store.tables import JobRow, ModelRow


async def create_model(
    session: AsyncSession,
    job: JobRow,
    parent: ModelRow | None,
    manifest: ResultManifest | None,
    reached: Reached,
    *,
    now: datetime,
) -> ModelRow | None:
    """Write the row of what a stage made, if that is a model. The card follows, as it names the row's id."""
    spec, state = JobSpec.of(job), KINDS[job.kind].produces
    if manifest is None or state is None or spec.runner_call is not None:
        return None  # what a call of DeepExtension's backend makes is listed there
    assert spec.base_model is not None
    assert job.method_id is not None
    assert job.method_version is not None
    data = spec.dataset
    new = models.NewModel(
        name=model_name(job, spec, parent, now=now),
        state=state,
        training_type=spec.training_type,
        path=manifest.root,
        size_bytes=manifest.size_bytes,
        base_model_id=spec.base_model.id,
        base_model_name=spec.base_model.name,
        base_model_path=spec.base_model.path,
        parent_id=parent.id if parent else None,
        job_id=job.id,
        method_id=job.method_id,
        method_version=job.method_version,
        dataset_id=data.id if data else None,
        dataset_name=data.name if data else None,
        dataset_digest=data.digest if data else None,
        parameters=spec.effective,
        details={
            "kind": manifest.kind,
            "files": [file.model_dump() for file in manifest.files],
            "result": manifest.result,
            "deployment": spec.deployment.model_dump() if spec.deployment else None,
            "evaluations": [asdict(evaluation) for evaluation in reached.evaluations],
            "metrics": reached.metrics,
        },
        project_id=job.project_id,
        created_by=job.created_by,
    )
    row = await models.create_model(session, new, now=now)
    if row.path is not None:
        # the card is written after the end is, because it names the model's id; its bytes are known now
        files = with_card(manifest.files, render(_model_card(job, row)))
        row.size_bytes = sum(file.size for file in files)
        row.details = {**row.details, "files": [file.model_dump() for file in files]}
    return row


def write_card(home: Home, job: JobRow, model: ModelRow) -> None:
    """Write the card of a model in the home folder, from its rows in the database."""
    if model.path is not None and home.absolute(model.path).is_dir():
        write_model_card(home.absolute(model.path), _model_card(job, model))


def model_name(job: JobRow, spec: JobSpec, parent: ModelRow | None, *, now: datetime) -> str:
    """Return the name that the contract gives to what the job makes."""
    job_id = UUID(job.id)
    state = KINDS[job.kind].produces
    if state is ModelState.ONLINE:
        assert parent is not None
        quantize = spec.deployment.quantize if spec.deployment else None
        return online_name(source_name=parent.name, deployment_id=job_id, quantization=quantize)
    if state is ModelState.COMPLETE and parent is not None:
        return complete_name(source_name=parent.name, saving_id=job_id)
    assert spec.base_model is not None
    return produced_name(technical_name=spec.base_model.name, train_name=job.name, produced_at=now, job_id=job_id)


def _model_card(job: JobRow, model: ModelRow) -> ModelCard:
    lineage = {"model": model.id, "job": job.id, "base model": model.base_model_id, "method": model.method_id}
    spec = JobSpec.of(job)
    if model.parent_id is not None:
        lineage["made from"] = model.parent_id
    if spec.reward_model is not None:
        lineage["reward model"] = spec.reward_model.id
    return ModelCard(
        name=model.name,
        state=model.state,
        training_type=model.training_type,
        kind=ArtifactKind(model.details["kind"]),
        technique=spec.technique,
        base_model=model.base_model_name,
        method=job.method_name or "",
        method_version=model.method_version,
        created_at=model.created_at,
        dataset=model.dataset_name,
        dataset_digest=model.dataset_digest,
        parameters=model.parameters,
        metrics=model.details["metrics"],
        scores=[
            Score(name=one["name"], before=one["before"], after=one["after"], samples=one["samples"] or 0)
            for one in model.details["evaluations"]
        ],
        lineage=lineage,
    )
