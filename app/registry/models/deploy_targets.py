"""Deploy targets: where online models are served."""

from collections.abc import Callable
from datetime import datetime
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import CUSTOM_TARGET
from app.domain.deploy_targets import DeployTargetKind, normal_url, url_violations
from app.domain.errors import Conflict, InvalidRequest
from app.domain.names import name_key, name_violations, normal_name
from app.store import named
from app.store.deploy_targets import get_deploy_target
from app.store.paging import PageRequest, Slice
from app.store.tables import DeployTargetRow
from app.store.usage import methods_deploying_to


class DeployTargetInUse(Conflict):
    """Methods deploy to the target."""

    code = "deploy_target_in_use"


class DeployTargets:
    """What can be done with deploy targets."""

    def __init__(self, *, clock: Callable[[], datetime]) -> None:
        self._clock = clock

    async def get(self, session: AsyncSession, deploy_target: str) -> DeployTargetRow:
        """Return the deploy target with this id or name."""
        return await get_deploy_target(session, deploy_target)

    async def page(
        self, session: AsyncSession, wanted: PageRequest, *, text: str | None = None
    ) -> Slice[DeployTargetRow]:
        """Return one page of the deploy targets."""
        return await named.page(session, DeployTargetRow, wanted, text=text)

    async def create(self, session: AsyncSession, *, name: str, kind: DeployTargetKind, url: str) -> DeployTargetRow:
        """Register a deploy target. It is not contacted: it may be started later."""
        if found := name_violations(name, reserved=[CUSTOM_TARGET]) + url_violations(url):
            raise InvalidRequest(found)
        row = DeployTargetRow(
            id=str(uuid4()),
            name=normal_name(name),
            name_key=name_key(name),
            kind=kind,
            url=normal_url(url),
            created_at=self._clock(),
        )
        await named.insert(session, row)
        return row

    async def delete(self, session: AsyncSession, deploy_target: str) -> None:
        """Delete the target unless a method names it: that method could not work any more."""
        row = await get_deploy_target(session, deploy_target)
        if methods := await methods_deploying_to(session, row.name):
            raise DeployTargetInUse(deploy_target=row.name, methods=", ".join(methods))
        await named.delete(session, row)
