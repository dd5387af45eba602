"""What the tests of base models, data sets, targets, environments, nodes and models share."""

import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.api.routes import base_models, datasets, deploy_targets, environments, models, nodes
from app.domain.enums import JobKind, JobStatus, ModelState, TrainingType
from app.store import jobs
from app.store.models import NewModel, create_model
from app.store.session import Database
from app.store.tables import JobRow

ROUTERS = (
    base_models.router,
    datasets.router,
    deploy_targets.router,
    environments.router,
    nodes.router,
    models.router,
)


def codes(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return where and what, for every problem of an answer."""
    return [(entry["pointer"], entry["code"]) for entry in body.get("errors", body.get("violations", []))]


def safetensors(**shapes: list[int]) -> bytes:
    """Return the bytes of a safetensors file with tensors of these shapes, all zero, in float16."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def place_base_model(folder: Path, **config: Any) -> Path:
    """Put a tiny base model into `folder`."""
    folder.mkdir(parents=True)
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").write_bytes(safetensors(embedding=[10, 4], head=[4, 10]))
    return folder


def new_job(*, status: JobStatus = JobStatus.QUEUED, **values: Any) -> JobRow:
    """Return the row of a training job."""
    now = datetime.now(UTC)
    job_id = str(uuid4())
    defaults: dict[str, Any] = {
        "name": "job",
        "kind": JobKind.TRAINING,
        "reason_params": {},
        "chain_id": job_id,
        "environment": "base",
        "parameters": {},
        "launch": {},
        "created_at": now,
        "updated_at": now,
    }
    return JobRow(**{"id": job_id, "status": status, **defaults, **values})


async def insert_job(database: Database, **values: Any) -> JobRow:
    """Insert a training job."""
    job = new_job(**values)
    async with database.writing() as session:
        await jobs.insert(session, [job])
    return job


async def insert_model(database: Database, *, method_id: str, **values: Any) -> str:
    """Insert a model and the job that made it; return the model's id."""
    job = await insert_job(database, status=JobStatus.SUCCEEDED, method_id=method_id)
    defaults: dict[str, Any] = {
        "name": f"tiny_job_20260101_{job.id[:4]}",
        "state": ModelState.CUSTOMIZED,
        "training_type": TrainingType.CHAT,
        "path": f"runs/{job.id}/1/output",
        "size_bytes": 3,
        "base_model_id": "base-id",
        "base_model_name": "tiny",
        "base_model_path": "models/tiny",
        "job_id": job.id,
        "method_id": method_id,
        "method_version": 1,
    }
    async with database.writing() as session:
        row = await create_model(session, NewModel(**{**defaults, **values}), now=datetime.now(UTC))
    return row.id
