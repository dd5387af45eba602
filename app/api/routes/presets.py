"""Presets: the methods that the product ships."""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.list_response import page_by_name
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routes.methods import tagged_method
from app.api.routing import Router
from app.api.schemas.methods import MethodRead
from app.api.schemas.presets import PresetRead, preset_read
from app.domain.access import Permission
from app.registry.methods.preset_install import PresetNotFound
from app.store.methods import NameTaken

router = Router(changes=Permission.DEVELOP, prefix="/api/v1", tags=["presets"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]
PresetRef = Annotated[str, Path(description="Name of the preset.", examples=["SFT-Demo"])]
"""`{preset}` in the addresses."""


@router.get("/presets", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_presets(
    session: ReadSession, services: ServicesDep, language: RequestLanguage, paging: Paging
) -> Page[PresetRead]:
    """List the shipped methods and what became of them here."""
    statuses = await services.methods.presets.statuses(session)
    return page_by_name([preset_read(status, language) for status in statuses], paging, name=lambda found: found.name)


@router.get("/presets/{preset}", responses=problem_responses(PresetNotFound))
async def get_preset(
    preset: PresetRef, session: ReadSession, services: ServicesDep, language: RequestLanguage
) -> PresetRead:
    """Read a shipped method and what became of it here."""
    return preset_read(await services.methods.presets.status(session, preset), language)


@router.post("/presets/{preset}:install", responses=problem_responses(PresetNotFound, NameTaken))
async def install_preset(
    preset: PresetRef, session: WriteSession, services: ServicesDep, response: Response
) -> MethodRead:
    """Install a shipped method, also one that was deleted; answers with the method if it is there already."""
    return await tagged_method(services, await services.methods.presets.install(session, preset), response)
