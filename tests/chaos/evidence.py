"""Collect what a verdict is made of from the database and the journal."""

from pathlib import Path
from typing import Any

from sqlmodel import col, select

from app.store.session import Database
from app.store.tables import AttemptRow, JobEventRow, JobRow, LeaseRow, ModelRow, NodeRow
from tests.chaos.stage import read_journal
from tests.chaos.verdict import Attempt, Event, Evidence, Job, Lease


async def collect(database: Database, *, journal: Path, **known: Any) -> Evidence:
    """Return the evidence; `known` is what only the harness knows."""
    async with database.reading() as session:
        jobs = (await session.exec(select(JobRow))).all()
        attempts = (await session.exec(select(AttemptRow))).all()
        events = (await session.exec(select(JobEventRow).order_by(col(JobEventRow.id)))).all()
        leases = (await session.exec(select(LeaseRow))).all()
        models = (await session.exec(select(ModelRow.job_id))).all()
        names = {row.id: row.name for row in (await session.exec(select(NodeRow))).all()}
    return Evidence(
        journal=read_journal(journal),
        jobs=[Job(row.id, row.status, row.reason) for row in jobs],
        attempts=[Attempt(row.id, row.job_id, row.number, names[row.node_id], live=row.live) for row in attempts],
        events=[Event(row.job_id, row.status, row.created_at.timestamp()) for row in events],
        leases=[_lease(row, names[row.node_id]) for row in leases],
        models=[job_id for job_id in models if job_id is not None],
        **known,
    )


def _lease(row: LeaseRow, node: str) -> Lease:
    ended = row.released_at.timestamp() if row.released_at else None
    return Lease(node, row.accelerator, row.attempt_id, row.created_at.timestamp(), ended)
