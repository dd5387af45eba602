"""Nodes: machines with a worker. They register themselves.

What people request (drain, labels) is in the node's row; the worker acts on it in its next round, or at once when a
notification arrives.
"""

from typing import Annotated

from fastapi import Depends, Path, Response

from app.api.conditional import IfMatch, StaleVersion, etag_of
from app.api.dependencies import ReadSession, ServicesDep, WriteSession, notify_after_commit
from app.api.errors import PreconditionRequired, problem_responses
from app.api.language import RequestLanguage
from app.api.list_response import page_by_name
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router, needs
from app.api.schemas.nodes import NodeAllowListWrite, NodeDeclaration, NodePatch, NodeRead, node_read
from app.domain.access import Permission
from app.domain.allow_lists import AllowList
from app.domain.errors import InvalidRequest
from app.domain.texts import Language
from app.executor.nodes.lost_nodes import NodeInUse, NodeIsAlive, NodeNotConfirmed
from app.registry.environments.allow_lists import WantedList
from app.registry.nodes.service import NodeView, TooManyLabels
from app.store.leases import AcceleratorInUse, AcceleratorNotFound
from app.store.nodes import NodeNotFound

router = Router(changes=Permission.ADMINISTER, prefix="/api/v1", tags=["nodes"])

Paging = Annotated[PageParams, Depends(page_params("name", default="name"))]
NodeRef = Annotated[str, Path(description="Id or name of the node.", examples=["laptop"])]
"""`{node}` in the addresses."""


@router.get("/nodes", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_nodes(
    session: ReadSession, services: ServicesDep, paging: Paging, language: RequestLanguage
) -> Page[NodeRead]:
    """List the nodes with what they have and the age of their last heartbeat."""
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
    """Release an accelerator that is quarantined because processes of its last attempt could not be killed.

    The node does so by itself once they are gone. A job that holds it is not touched: cancel that instead.
    """
    return node_read(await services.nodes.release(session, node, accelerator), language)


@router.get("/nodes/{node}", responses=problem_responses(NodeNotFound))
async def get_node(
    node: NodeRef, session: ReadSession, services: ServicesDep, language: RequestLanguage, response: Response
) -> NodeRead:
    """Read a node: its machine, who has its accelerators, what it is at, and how it stands with it."""
    return _tagged(await services.nodes.get(session, node), language, response)


@router.patch(
    "/nodes/{node}",
    responses=problem_responses(NodeNotFound, TooManyLabels, InvalidRequest, PreconditionRequired, StaleVersion),
)
async def update_node(
    node: NodeRef,
    patch: NodePatch,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    language: RequestLanguage,
    response: Response,
) -> NodeRead:
    """Set labels of a node (JSON merge patch, RFC 7396): null takes one away. Those of its worker stay."""
    changes = patch.extra_labels if "extra_labels" in patch.model_fields_set else {}
    view = await services.nodes.change_labels(session, node, changes, check=if_match.require)
    notify_after_commit(session, services.notifier, view.row.id)
    return _tagged(view, language, response)


@router.get("/nodes/{node}/allowed", responses=problem_responses(NodeNotFound))
@needs(Permission.ADMINISTER)
async def get_allowed_on_node(
    node: NodeRef, session: ReadSession, services: ServicesDep, response: Response
) -> AllowList:
    """Read what the node may run; empty lists: everything."""
    return _tagged_list(await services.allow_lists.of_node(session, node), response)


@router.put(
    "/nodes/{node}/allowed",
    responses=problem_responses(NodeNotFound, InvalidRequest, PreconditionRequired, StaleVersion),
)
async def set_allowed_on_node(
    node: NodeRef,
    wanted: NodeAllowListWrite,
    session: WriteSession,
    services: ServicesDep,
    if_match: IfMatch,
    response: Response,
) -> AllowList:
    """Say which methods, projects and environments the node may run. Jobs that it has taken go on."""
    lists = WantedList(**wanted.model_dump())
    return _tagged_list(await services.allow_lists.set_of_node(session, node, lists, check=if_match.require), response)


@router.post("/nodes/{node}:drain", responses=problem_responses(NodeNotFound))
async def drain_node(
    node: NodeRef, session: WriteSession, services: ServicesDep, language: RequestLanguage
) -> NodeRead:
    """Stop giving jobs to the node. Running jobs continue. The node is `drained` when the last one has ended."""
    view = await services.nodes.drain(session, node)
    notify_after_commit(session, services.notifier, view.row.id)
    return node_read(view, language)


@router.post("/nodes/{node}:undrain", responses=problem_responses(NodeNotFound))
async def undrain_node(
    node: NodeRef, session: WriteSession, services: ServicesDep, language: RequestLanguage
) -> NodeRead:
    """Let a node take jobs again."""
    view = await services.nodes.undrain(session, node)
    notify_after_commit(session, services.notifier, view.row.id)
    return node_read(view, language)


@router.post(
    "/nodes/{node}:declare-dead",
    responses=problem_responses(NodeNotFound, NodeNotConfirmed, NodeIsAlive, InvalidRequest),
)
async def declare_node_dead(
    node: NodeRef,
    declaration: NodeDeclaration,
    session: WriteSession,
    services: ServicesDep,
    language: RequestLanguage,
) -> NodeRead:
    """Say that the processes of a silent node are gone: its jobs run elsewhere, or end as `node_lost`.

    Only a person can know that. Should the node live after all, it can change nothing any more: its worker ends what is
    left and the node is ready again by itself.
    """
    view = await services.nodes.declare_dead(session, node, confirm=declaration.confirm)
    notify_after_commit(session, services.notifier, view.row.id)
    return node_read(view, language)


@router.delete(
    "/nodes/{node}",
    status_code=204,
    responses=problem_responses(NodeNotFound, NodeInUse, PreconditionRequired, StaleVersion),
)
async def delete_node(node: NodeRef, session: WriteSession, services: ServicesDep, if_match: IfMatch) -> None:
    """Remove a node that is dead, or drained and empty. Its worker ends; started again, it joins as a new node."""
    await services.nodes.remove(session, node, check=if_match.require)


def _tagged_list(allowed: AllowList, response: Response) -> AllowList:
    response.headers["ETag"] = etag_of(allowed.version)
    return allowed


def _tagged(view: NodeView, language: Language, response: Response) -> NodeRead:
    response.headers["ETag"] = etag_of(view.version)
    return node_read(view, language)
