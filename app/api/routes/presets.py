"""Presets: the methods that the product ships."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.routes.methods import tagged_method
from app.api.schemas.methods import MethodRead, PresetList, preset_read
from app.registry.preset_install import PresetNotFound
from app.store.methods import NameTaken

router = APIRouter(prefix="/api/v1", tags=["presets"])


@router.get("/presets")
async def list_presets(session: ReadSession, services: ServicesDep, language: RequestLanguage) -> PresetList:
    """List the shipped methods and what became of them here."""
    return PresetList(
        items=[preset_read(status, language) for status in await services.methods.presets.statuses(session)]
    )


@router.post("/presets/{name}:install", responses=problem_responses(PresetNotFound, NameTaken))
async def install_preset(
    name: Annotated[str, Path(description="Name of the preset.", examples=["SFT-Demo"])],
    session: WriteSession,
    services: ServicesDep,
    response: Response,
) -> MethodRead:
    """Install a shipped method, also one that was deleted; answers with the method if it is there already."""
    return await tagged_method(services, await services.methods.presets.install(session, name), response)
