"""Nodes: machines with a worker. They register themselves."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from app.api.dependencies import ReadSession, ServicesDep
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.schemas.resources import NodeRead, node_read
from app.api.small_lists import page_by_name
from app.store.nodes import NodeNotFound

router = APIRouter(prefix="/api/v1", tags=["nodes"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]


@router.get("/nodes", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_nodes(
    session: ReadSession, services: ServicesDep, paging: Paging, language: RequestLanguage
) -> Page[NodeRead]:
    """List the nodes with what they have and when they were last heard of."""
    views = await services.nodes.views(session)
    return page_by_name([node_read(view, language) for view in views], paging, name=lambda view: view.name)


@router.get("/nodes/{node}", responses=problem_responses(NodeNotFound))
async def get_node(
    node: Annotated[str, Path(description="Id or name of the node.", examples=["laptop"])],
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
) -> NodeRead:
    """Read a node."""
    return node_read(await services.nodes.get(session, node), language)
