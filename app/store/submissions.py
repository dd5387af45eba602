"""The rows that a submission rests on: read in one statement, looked at again in one when it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.names import name_key
from app.domain.projects import DEFAULT_PROJECT, ProjectLimits
from app.store.session import scope_of
from app.store.tables import (
    BaseModelRow,
    DatasetRow,
    EnvironmentRow,
    MethodRow,
    MethodVersionRow,
    ModelRow,
    NodeRow,
    ProjectRow,
)

_SEPARATOR = "\n"  # no name of an environment has one


@dataclass(frozen=True)
class Named:
    """What a request names, and what else decides whether it is accepted.

    `environments` are the names that are registered; `has_nodes`: more of them may be known from nodes.
    """

    method: MethodRow
    version: MethodVersionRow
    base_model: BaseModelRow | None
    dataset: DatasetRow | None
    environments: frozenset[str]
    has_nodes: bool
    limits: ProjectLimits


async def find_named(
    session: AsyncSession, *, method: str, base_model: str | None, dataset: str | None
) -> Named | None:
    """Return the newest version of the method with the inputs, each by id, else by name. None: no such method."""
    given = {"method": method, "base_model": base_model, "dataset": dataset}
    keys = {f"{kind}_key": None if name is None else name_key(name) for kind, name in given.items()}
    keys["project"] = scope_of(session).project or DEFAULT_PROJECT
    rows: Sequence[Any] = (await session.exec(_NAMED, params=given | keys)).all()  # type: ignore[call-overload]
    if not rows:
        return None
    # a row with this id comes before one with this name
    ids = tuple(given.values())
    row = max(rows, key=lambda row: [one is not None and one.id == id_ for one, id_ in zip(row[:3], ids, strict=True)])
    method_row, base_row, data_row, version, environments, has_nodes, limits = row
    return Named(
        method=method_row,
        version=version,
        base_model=base_row,
        dataset=data_row,
        environments=frozenset(environments.split(_SEPARATOR) if environments else ()),
        has_nodes=has_nodes,
        limits=ProjectLimits(**(limits or {})),
    )


@dataclass(frozen=True)
class Remaining:
    """What is left of the named rows: the method's newest version, and what is None where a row is gone."""

    version: int
    base_model: str | None
    dataset_digest: str | None
    model: str | None


async def look_again(
    session: AsyncSession, *, method_id: str, base_model_id: str | None, dataset_id: str | None, model_id: str | None
) -> Remaining | None:
    """Return how the rows stand now. None: the method is gone; else it is locked until the transaction ends."""
    ids = {"method": method_id, "base_model": base_model_id, "dataset": dataset_id, "model": model_id}
    row = (await (await session.connection()).execute(_AGAIN, ids)).first()
    return None if row is None else Remaining(*row)


def _is_given(table: Any, kind: str) -> sa.ColumnElement[bool]:
    return sa.or_(col(table.id) == _given(kind), col(table.name_key) == _given(f"{kind}_key"))


def _given(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.String())


_NAMED = (
    sa.select(
        MethodRow,
        BaseModelRow,
        DatasetRow,
        MethodVersionRow,
        sa.select(sa.func.aggregate_strings(col(EnvironmentRow.name), _SEPARATOR)).scalar_subquery(),
        sa.exists().where(col(NodeRow.removed_at).is_(None)),
        sa.select(col(ProjectRow.limits)).where(col(ProjectRow.id) == _given("project")).scalar_subquery(),
    )
    .select_from(MethodRow)
    .join(
        MethodVersionRow,
        sa.and_(col(MethodVersionRow.method_id) == MethodRow.id, col(MethodVersionRow.number) == MethodRow.version),
    )
    .outerjoin(BaseModelRow, _is_given(BaseModelRow, "base_model"))
    .outerjoin(DatasetRow, _is_given(DatasetRow, "dataset"))
    .where(col(MethodRow.deleted_at).is_(None), _is_given(MethodRow, "method"))
)
_AGAIN = (
    select(MethodRow.version, BaseModelRow.id, DatasetRow.digest, ModelRow.id)
    .select_from(MethodRow)
    .outerjoin(BaseModelRow, col(BaseModelRow.id) == _given("base_model"))
    .outerjoin(DatasetRow, col(DatasetRow.id) == _given("dataset"))
    .outerjoin(ModelRow, sa.and_(col(ModelRow.id) == _given("model"), col(ModelRow.deleted_at).is_(None)))
    .where(col(MethodRow.id) == _given("method"), col(MethodRow.deleted_at).is_(None))
    # "for no key update": jobs that merely refer to the method are not held up
    .with_for_update(of=MethodRow, key_share=True)
)
