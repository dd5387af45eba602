"""Nodes: machines with a worker, and what they last said of themselves."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator
from app.domain.enums import Platform
from app.domain.errors import NotFound
from app.store.tables import NodeRow

NODE_SILENT_AFTER = timedelta(seconds=60)
"""A node that was not heard of for so long gets no work and counts as gone until it speaks again."""


class NodeNotFound(NotFound):
    """No node has this id or name."""

    code = "node_not_found"


async def register_node(
    session: AsyncSession,
    *,
    name: str,
    platform: Platform,
    accelerators: Sequence[Mapping[str, Any]],
    environments: Sequence[str],
    slots: int,
    boot_id: str,
    now: datetime,
) -> NodeRow:
    """Insert the node or bring its row up to date; a node keeps its id as long as it keeps its name."""
    row = (await session.exec(select(NodeRow).where(NodeRow.name == name))).first()
    said: dict[str, Any] = {
        "platform": platform,
        "accelerators": [dict(accelerator) for accelerator in accelerators],
        "environments": sorted(environments),
        "slots": slots,
        "boot_id": boot_id,
        "heartbeat_at": now,
    }
    if row is None:
        row = NodeRow(id=str(uuid4()), name=name, created_at=now, **said)
    for column, value in said.items():
        setattr(row, column, value)
    session.add(row)
    await session.flush()
    return row


async def heartbeat(
    session: AsyncSession,
    node_id: str,
    *,
    now: datetime,
    environments: Sequence[str] | None = None,
    environment_states: Sequence[Mapping[str, Any]] | None = None,
    inventory: Mapping[str, Any] | None = None,
) -> bool:
    """Say that the node is alive, and what changed on it; return `False` if nobody knows it any more."""
    values: dict[str, Any] = {"heartbeat_at": now}
    if environment_states is not None:
        values["environment_states"] = [dict(state) for state in environment_states]
    if environments is not None:
        values["environments"] = sorted(environments)
    if inventory is not None:
        values["inventory"] = dict(inventory)
    result = await session.exec(sa.update(NodeRow).where(col(NodeRow.id) == node_id).values(**values))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def all_nodes(session: AsyncSession) -> Sequence[NodeRow]:
    """Return the nodes by name; there are dozens, not thousands."""
    return (await session.exec(select(NodeRow).order_by(col(NodeRow.name)))).all()


async def working_nodes(session: AsyncSession, *, now: datetime) -> Sequence[NodeRow]:
    """Return the nodes that were heard of lately and take jobs."""
    return [row for row in await all_nodes(session) if now - row.heartbeat_at < NODE_SILENT_AFTER and takes_jobs(row)]


def takes_jobs(row: NodeRow) -> bool:
    """Say whether the node may claim at all: nobody drains it or declared it dead, and it has not refused."""
    return row.draining_at is None and row.dead_at is None and row.refusal is None


def accelerators_of(row: NodeRow) -> Sequence[Accelerator]:
    """Return the accelerators that the node reported."""
    return [Accelerator.of(document) for document in row.accelerators if "id" in document]


def blocked_of(row: NodeRow) -> Collection[str]:
    """Return the ids of the accelerators that strangers use, or that are missing, as the node said last."""
    return {entry["id"] for entry in row.inventory.get("blocked", ())}


async def get_node(session: AsyncSession, node: str) -> NodeRow:
    """Return the node with this id or name or raise `NodeNotFound`."""
    row = await session.get(NodeRow, node)
    row = row or (await session.exec(select(NodeRow).where(NodeRow.name == node))).first()
    if row is None:
        raise NodeNotFound(node=node)
    return row
