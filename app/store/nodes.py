"""Nodes: machines with a worker, and what they last said of themselves."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator
from app.domain.enums import Platform
from app.domain.environment_reports import EnvironmentState
from app.domain.errors import NotFound
from app.store.tables import NodeRow

NODE_SILENT_AFTER = timedelta(seconds=60)
"""A node without a heartbeat for so long gets no work and counts as gone until its next one."""


class NodeStatus(StrEnum):
    """The state that people and the node itself set, whatever the age of its heartbeat."""

    READY = "ready"
    DRAINING = "draining"  # a person wants it empty: what runs goes on, nothing new begins
    REFUSING = "refusing"  # it accepts no jobs by itself; `refusal` says why
    DEAD = "dead"  # a person says that its processes are gone
    REMOVED = "removed"


GONE_STATUSES = frozenset({NodeStatus.DEAD, NodeStatus.REMOVED})
# what `node_status_of` reads
STATUS_COLUMNS = tuple(map(col, (NodeRow.removed_at, NodeRow.dead_at, NodeRow.draining_at, NodeRow.refusal)))


class NodeNotFound(NotFound):
    """No node has this id or name."""

    code = "node_not_found"


class RegistrationRefused(Exception):
    """The worker cannot be this node; the message is for the person who started it."""


class NodeNameTaken(RegistrationRefused):
    """Another machine has the name."""

    def __init__(self, row: NodeRow, *, age: timedelta) -> None:
        host = row.inventory.get("hostname") or "another machine"
        super().__init__(
            f"The name {row.name!r} belongs to a node with another DEEPE_NODE_HOME ({host}, last heartbeat "
            f"{age.total_seconds():.0f} s ago). Give this worker a name of its own with DEEPE_NODE_NAME; or, if that "
            f"machine is gone for good, free the name: deepe nodes declare-dead {row.name} --yes"
        )


class NodeHomeShared(RegistrationRefused):
    """A worker on another machine uses the same node home right now."""

    def __init__(self, row: NodeRow) -> None:
        super().__init__(
            f"A worker on {row.inventory.get('hostname')} is running as node {row.name!r} with this very "
            "DEEPE_NODE_HOME. Every machine needs a local folder of its own there, and a DEEPE_NODE_NAME of its own."
        )


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
    home_id: str = "",
    hostname: str = "",
    labels: Mapping[str, str] | None = None,
) -> NodeRow:
    """Insert the node or bring its row up to date; raise `RegistrationRefused` if another machine is this node.

    A node keeps its row as long as it keeps its node home, whatever became of it: a dead one stays dead here.
    """
    row = (await session.exec(select(NodeRow).where(NodeRow.name == name).with_for_update())).first()
    if row is not None and row.home_id not in ("", home_id):
        if row.dead_at is None:
            raise NodeNameTaken(row, age=now - row.heartbeat_at)
        await remove_node(session, row, now=now)  # the dead machine's replacement takes the name
        row = None
    if row is not None and _is_elsewhere(row, boot_id=boot_id, hostname=hostname, now=now):
        raise NodeHomeShared(row)
    said: dict[str, Any] = {
        "home_id": home_id,
        "boot_id": boot_id,
        "platform": platform,
        "accelerators": [dict(accelerator) for accelerator in accelerators],
        "environments": sorted(environments),
        "slots": slots,
        "worker_labels": dict(labels or {}),
    }
    if row is None:
        row = NodeRow(id=str(uuid4()), name=name, created_at=now, heartbeat_at=now, **said)
    elif row.dead_at is None:
        row.heartbeat_at = now
    for column, value in said.items():
        setattr(row, column, value)
    row.labels = row.worker_labels | row.extra_labels
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
    refusal: Mapping[str, Any] | None = None,
) -> bool:
    """Say that the node is alive, and what changed on it. False: it is dead or removed, and stays so.

    `refusal` is said anew with every beat: None means that the node takes jobs.
    """
    values: dict[str, Any] = {"heartbeat_at": now, "refusal": None if refusal is None else dict(refusal)}
    if environment_states is not None:
        values["environment_states"] = [dict(state) for state in environment_states]
    if environments is not None:
        values["environments"] = sorted(environments)
    if inventory is not None:
        values["inventory"] = dict(inventory)
    result = await session.exec(
        sa.update(NodeRow)
        .where(col(NodeRow.id) == node_id, col(NodeRow.dead_at).is_(None), col(NodeRow.removed_at).is_(None))
        .values(**values)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def revive(session: AsyncSession, node_id: str, *, now: datetime) -> bool:
    """Revive a dead node that proved that nothing of its attempts is left. False: it was not dead."""
    result = await session.exec(
        sa.update(NodeRow)
        .where(col(NodeRow.id) == node_id, col(NodeRow.dead_at).is_not(None), col(NodeRow.removed_at).is_(None))
        .values(dead_at=None, heartbeat_at=now)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def free_names(session: AsyncSession) -> None:
    """Let every node be joined by whichever machine comes with its name; labels and history stay."""
    await session.exec(sa.update(NodeRow).values(home_id="", boot_id="", heartbeat_at=NodeRow.created_at))


async def remove_node(session: AsyncSession, row: NodeRow, *, now: datetime) -> None:
    """Take the node out of all lists and free its name; its attempts go on to refer to the row."""
    row.removed_at = now
    row.name = f"{row.name[:80]} (removed {row.id[:8]})"
    session.add(row)
    await session.flush()


async def set_extra_labels(session: AsyncSession, row: NodeRow, labels: Mapping[str, str]) -> None:
    """Replace the labels that people gave; they win over those of the worker."""
    row.extra_labels = dict(labels)
    row.labels = row.worker_labels | row.extra_labels
    session.add(row)
    await session.flush()


async def all_nodes(session: AsyncSession) -> Sequence[NodeRow]:
    """Return the nodes by name, dead ones among them; there are dozens, not thousands."""
    statement = select(NodeRow).where(col(NodeRow.removed_at).is_(None)).order_by(col(NodeRow.name))
    return (await session.exec(statement)).all()


async def working_nodes(session: AsyncSession, *, now: datetime) -> Sequence[NodeRow]:
    """Return the nodes with a recent heartbeat that accept jobs."""
    return [row for row in await all_nodes(session) if now - row.heartbeat_at < NODE_SILENT_AFTER and takes_jobs(row)]


def node_status_of(row: NodeRow | sa.Row[Any]) -> NodeStatus:
    """Return the status of the node: the gravest that applies. Of a row of columns, `STATUS_COLUMNS` are read."""
    if row.removed_at is not None:
        return NodeStatus.REMOVED
    if row.dead_at is not None:
        return NodeStatus.DEAD
    if row.draining_at is not None:
        return NodeStatus.DRAINING
    return NodeStatus.READY if row.refusal is None else NodeStatus.REFUSING


def takes_jobs(row: NodeRow) -> bool:
    """Say whether the node may claim at all: it is neither drained nor declared dead, and it does not refuse."""
    return node_status_of(row) is NodeStatus.READY


def accelerators_of(row: NodeRow) -> Sequence[Accelerator]:
    """Return the accelerators that the node reported."""
    return [Accelerator.of(document) for document in row.accelerators if "id" in document]


def blocked_of(row: NodeRow) -> Collection[str]:
    """Return the ids of the accelerators that foreign processes use, or that are missing, by its last report."""
    return {entry["id"] for entry in row.inventory.get("blocked", ())}


def lacking_of(row: NodeRow) -> Mapping[str, frozenset[str]]:
    """Return, for each environment that is ready, the modules that the node looked for there and did not find."""
    return {
        state["name"]: frozenset(state["probe"].get("missing", ()))
        for state in row.environment_states or ()
        if state.get("state") == EnvironmentState.READY and state.get("probe")
    }


async def get_node(session: AsyncSession, node: str, *, lock: bool = False) -> NodeRow:
    """Return the node with this id or name or raise `NodeNotFound`. With `lock` it claims nothing meanwhile."""
    named = sa.or_(col(NodeRow.id) == node, col(NodeRow.name) == node)
    statement = select(NodeRow).where(named, col(NodeRow.removed_at).is_(None))
    if lock:
        # "for no key update": attempts that merely refer to the row are not held up
        statement = statement.with_for_update(key_share=True).execution_options(populate_existing=True)
    found = {row.id: row for row in (await session.exec(statement)).all()}
    row = found.get(node) or next(iter(found.values()), None)
    if row is None:
        raise NodeNotFound(node=node)
    return row


def _is_elsewhere(row: NodeRow, *, boot_id: str, hostname: str, now: datetime) -> bool:
    """Say whether a worker on another machine is this node: it beats, under another kernel and another host's name."""
    beats = now - row.heartbeat_at < NODE_SILENT_AFTER and row.dead_at is None
    return beats and row.boot_id != boot_id and row.inventory.get("hostname", hostname) != hostname
