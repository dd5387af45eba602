"""Images that models generated. The answers hold their addresses."""

import asyncio
from typing import Annotated

from fastapi import Path
from fastapi.responses import FileResponse

from app.api.dependencies import ServicesDep
from app.api.errors import problem_responses
from app.api.routing import Router
from app.domain.access import Permission
from app.executor.runs.pictures import MEDIA_TYPES, PictureNotFound, picture_path

router = Router(changes=Permission.RUN, tags=["models"])

PictureName = Annotated[str, Path(description="File name.", examples=["0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c.png"])]


@router.get(
    "/images/{name}",
    response_class=FileResponse,
    responses={
        200: {
            "description": "The picture.",
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}} for kind in sorted({*MEDIA_TYPES.values()})
            },
        },
        **problem_responses(PictureNotFound),
    },
)
async def get_picture(name: PictureName, services: ServicesDep) -> FileResponse:
    """Read an image that a model generated."""
    path = await asyncio.to_thread(picture_path, services.home.images, name)
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=headers)
