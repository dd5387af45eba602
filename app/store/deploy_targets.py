"""Deploy targets: configured places where online models are served."""

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import NotFound
from app.store import named
from app.store.tables import DeployTargetRow


class DeployTargetNotFound(NotFound):
    """No deploy target has this id or name."""

    code = "deploy_target_not_found"


async def get_deploy_target(session: AsyncSession, deploy_target: str) -> DeployTargetRow:
    """Return the deploy target with this id or name or raise `DeployTargetNotFound`."""
    row = await named.find(session, DeployTargetRow, deploy_target)
    if row is None:
        raise DeployTargetNotFound(deploy_target=deploy_target)
    return row


async def lock_deploy_target(session: AsyncSession, deploy_target: str) -> DeployTargetRow:
    """Return what `get_deploy_target` returns, as it is now, and keep others from changing it."""
    found = await get_deploy_target(session, deploy_target)
    row = await session.get(DeployTargetRow, found.id, populate_existing=True, with_for_update=True)
    if row is None:
        raise DeployTargetNotFound(deploy_target=deploy_target)
    return row
