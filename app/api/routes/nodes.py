"""Nodes: machines with a worker. They register themselves."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from app.api.dependencies import ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.schemas.resources import NodeRead, node_read
from app.api.small_lists import page_by_name
from app.store.leases import AcceleratorInUse, AcceleratorNotFound
from app.store.nodes import NodeNotFound

router = APIRouter(prefix="/api/v1", tags=["nodes"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]
NodeRef = Annotated[str, Path(description="Id or name of the node.", examples=["laptop"])]
"""`{node}` in the addresses."""


@router.get("/nodes", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_nodes(
    session: ReadSession, services: ServicesDep, paging: Paging, language: RequestLanguage
) -> Page[NodeRead]:
    """List the nodes with what they have and when they were last heard of."""
    views = await services.nodes.views(session)
    return page_by_name([node_read(view, language) for view in views], paging, name=lambda view: view.name)


@router.post(
    "/nodes/{node}/accelerators/{accelerator}:release",
    responses=problem_responses(NodeNotFound, AcceleratorNotFound, AcceleratorInUse),
)
async def release_accelerator(
    node: NodeRef,
    accelerator: Annotated[
        str,
        Path(description="Id of the accelerator.", examples=["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"]),
    ],
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
) -> NodeRead:
    """Put an accelerator back to use whose last attempt left processes that could not be killed.

    The node does so by itself once they are gone. A job that holds it is not touched: cancel that instead.
    """
    return node_read(await services.nodes.release(session, node, accelerator), language)


@router.get("/nodes/{node}", responses=problem_responses(NodeNotFound))
async def get_node(
    node: NodeRef,
    session: ReadSession,
    services: ServicesDep,
    language: RequestLanguage,
) -> NodeRead:
    """Read a node."""
    return node_read(await services.nodes.get(session, node), language)
