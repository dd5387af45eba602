"""Deploy targets: where online models are served."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import CUSTOM_TARGET
from app.domain.deploy_targets import (
    DeployTargetKind,
    normal_url,
    port_violations,
    settings_violations,
    url_violations,
    with_port,
    without_port,
)
from app.domain.errors import Conflict, InvalidRequest, Violation
from app.domain.names import name_key, name_violations, normal_name
from app.domain.pointers import merge_patch
from app.presets.shared.helpers.deepe_addresses import AddressPolicy, refused_literal
from app.registry.models.serving_tools import TargetSilent, ask_start_page
from app.store import named
from app.store.deploy_targets import get_deploy_target, lock_deploy_target
from app.store.paging import PageRequest, Slice
from app.store.tables import DeployTargetRow
from app.store.usage import methods_deploying_to


class DeployTargetInUse(Conflict):
    """Methods deploy to the target."""

    code = "deploy_target_in_use"


@dataclass(frozen=True)
class NewDeployTarget:
    """What a caller says of a target; `file` and `conda_env` are for methods that deploy to it and bring none."""

    name: str
    kind: DeployTargetKind
    url: str
    port: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    conda_env: str | None = None


@dataclass(frozen=True)
class Answer:
    """Whether a target can be deployed to, as far as its server's start page tells, and why."""

    usable: bool
    finding: Violation
    status: int | None = None


class DeployTargets:
    """What can be done with deploy targets."""

    def __init__(self, *, clock: Callable[[], datetime], addresses: AddressPolicy = AddressPolicy.ANY) -> None:
        self._clock = clock
        self._addresses = addresses

    async def get(self, session: AsyncSession, deploy_target: str) -> DeployTargetRow:
        """Return the deploy target with this id or name."""
        return await get_deploy_target(session, deploy_target)

    async def page(
        self, session: AsyncSession, wanted: PageRequest, *, text: str | None = None
    ) -> Slice[DeployTargetRow]:
        """Return one page of the deploy targets."""
        return await named.page(session, DeployTargetRow, wanted, text=text)

    async def create(self, session: AsyncSession, new: NewDeployTarget) -> DeployTargetRow:
        """Register a deploy target. It is not contacted: it may be started later."""
        if found := self._violations(new):
            raise InvalidRequest(found)
        row = DeployTargetRow(
            id=str(uuid4()),
            name=normal_name(new.name),
            name_key=name_key(new.name),
            kind=new.kind,
            url=normal_url(with_port(new.url, new.port)),
            settings=dict(new.settings),
            file=new.file,
            conda_env=new.conda_env,
            created_at=self._clock(),
        )
        await named.insert(session, row)
        return row

    async def change(self, session: AsyncSession, deploy_target: str, changes: Mapping[str, Any]) -> DeployTargetRow:
        """Change the target by a JSON merge patch of what `create` takes, name and kind excepted.

        A port without an address replaces that of the address, and null takes it away.
        """
        row = await lock_deploy_target(session, deploy_target)
        kept: dict[str, Any] = {
            "url": without_port(row.url) if "port" in changes else row.url,
            "settings": row.settings,
            "file": row.file,
            "conda_env": row.conda_env,
        }
        new = NewDeployTarget(name=row.name, kind=DeployTargetKind(row.kind), **merge_patch(kept, changes))
        if violations := self._violations(new):
            raise InvalidRequest(violations)
        await named.update(
            session,
            row,
            url=normal_url(with_port(new.url, new.port)),
            settings=dict(new.settings),
            file=new.file,
            conda_env=new.conda_env,
        )
        return row

    async def test(self, row: DeployTargetRow) -> Answer:
        """Ask the server for its start page, from where the service runs; a deployment runs on a node."""
        kind = DeployTargetKind(row.kind)
        try:
            status = await ask_start_page(row.url, policy=self._addresses)
        except TargetSilent as error:
            return Answer(False, Violation("", "target_without_answer", {"url": row.url, "problem": error.problem}))
        params = {"url": row.url, "status": status}
        if kind is DeployTargetKind.OLLAMA and status >= 400:
            return Answer(False, Violation("", "target_refuses", params), status)
        return Answer(True, Violation("", "target_answers", params), status)

    async def delete(self, session: AsyncSession, deploy_target: str) -> None:
        """Delete the target unless a method names it: that method could not work any more."""
        row = await get_deploy_target(session, deploy_target)
        if methods := await methods_deploying_to(session, row.name):
            raise DeployTargetInUse(deploy_target=row.name, methods=", ".join(methods))
        await named.delete(session, row)

    def _violations(self, new: NewDeployTarget) -> list[Violation]:
        found = list(_violations(new))
        if not url_violations(new.url) and (refused := refused_literal(normal_url(new.url), self._addresses)):
            found.append(Violation("/url", "target_address_refused", {"address": str(refused)}))
        return found


def _violations(new: NewDeployTarget) -> Iterator[Violation]:
    yield from name_violations(new.name, reserved=[CUSTOM_TARGET])
    yield from url_violations(new.url)
    yield from port_violations(new.url, new.port)
    yield from settings_violations(new.settings)
    if new.kind is not DeployTargetKind.CUSTOM:
        for member in ("settings", "file", "conda_env"):
            if getattr(new, member):
                yield Violation(f"/{member}", "target_member_not_custom", {"member": member})
