"""What was installed of the shipped methods and their samples, in which version, and what was deleted on purpose."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import SampleKind
from app.store.tables import BaseModelRow, DatasetRow, PresetRow, SampleRow

_INSTALL_LOCK = 0x70726573  # "pres"; any constant that no other user of the database takes


async def lock_installation(session: AsyncSession) -> None:
    """Lock the installation of presets until the transaction ends; on SQLite the transaction itself is the lock."""
    postgres = session.get_bind().dialect.name == "postgresql"
    await (await session.connection()).execute(
        sa.text(f"SELECT pg_advisory_xact_lock({_INSTALL_LOCK})" if postgres else "SELECT 1")
    )


async def all_rows(session: AsyncSession) -> Sequence[PresetRow]:
    """Return what was ever installed."""
    return (await session.exec(select(PresetRow))).all()


async def record(session: AsyncSession, name: str, *, method_id: str, version: int) -> None:
    """Remember that the preset is there, in this version."""
    row = (await session.exec(select(PresetRow).where(PresetRow.name == name))).first()
    if row is None:
        session.add(PresetRow(name=name, method_id=method_id, version=version, removed_at=None))
    else:
        row.method_id, row.version, row.removed_at = method_id, version, None
    await session.flush()


async def mark_removed(session: AsyncSession, method_id: str, *, now: datetime) -> None:
    """Remember that the preset's method was deleted, so that it stays away."""
    await session.exec(sa.update(PresetRow).where(col(PresetRow.method_id) == method_id).values(removed_at=now))


# ---- samples --------------------------------------------------------------------------------------------------------

SampleKey = tuple[SampleKind, str]


async def samples(session: AsyncSession) -> Mapping[SampleKey, SampleRow]:
    """Return every sample that was ever registered."""
    return {(row.kind, row.name): row for row in (await session.exec(select(SampleRow))).all()}


async def sample_resources(session: AsyncSession) -> Mapping[SampleKey, DatasetRow | BaseModelRow]:
    """Return the data set or base model of each sample; a deleted one is left out."""
    datasets = select(SampleRow, DatasetRow).join(DatasetRow, col(DatasetRow.id) == col(SampleRow.resource_id))
    models = select(SampleRow, BaseModelRow).join(BaseModelRow, col(BaseModelRow.id) == col(SampleRow.resource_id))
    found: dict[SampleKey, DatasetRow | BaseModelRow] = {}
    found |= {(row.kind, row.name): dataset for row, dataset in (await session.exec(datasets)).all()}
    found |= {(row.kind, row.name): model for row, model in (await session.exec(models)).all()}
    return found


async def record_sample(session: AsyncSession, key: SampleKey, *, digest: str, resource_id: str) -> None:
    """Remember which data set or base model a sample became, in this version."""
    kind, name = key
    row = (await session.exec(select(SampleRow).where(SampleRow.kind == kind, SampleRow.name == name))).first()
    if row is None:
        session.add(SampleRow(kind=kind, name=name, digest=digest, resource_id=resource_id))
    else:
        row.digest, row.resource_id = digest, resource_id
    await session.flush()
