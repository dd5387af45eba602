"""Give routes the services of this process and a session that commits before the response is sent."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.audit import AuditTrail
from app.access.keys import AccessKeys
from app.access.projects import Projects
from app.access.secrets import Secrets
from app.api.guards import PROJECT
from app.api.routing import caller_of
from app.domain.access import Caller
from app.domain.projects import DEFAULT_PROJECT
from app.executor.jobs.chat_service import ChatService
from app.executor.jobs.code_approval import JobCodeApproval
from app.executor.jobs.inference_requests import InferenceRequests
from app.executor.jobs.job_actions import JobActions
from app.executor.jobs.model_registration import ModelRegistration
from app.executor.jobs.row_previews import RowPreviews
from app.executor.jobs.stage_commands import StageCommands
from app.executor.jobs.submission import Submissions
from app.executor.maintenance.housekeeping import Housekeeper
from app.executor.maintenance.webhook_sender import WebhookSender
from app.executor.maintenance.webhooks import Webhooks
from app.executor.nodes.node_actions import NodeActions
from app.executor.nodes.notifier import Notifier
from app.executor.runs.stream import JobStreams
from app.faults import fault_point
from app.registry.base_models.service import BaseModels
from app.registry.datasets.mixes import DatasetMixes
from app.registry.datasets.service import Datasets
from app.registry.environments.allow_lists import AllowLists
from app.registry.environments.service import Environments
from app.registry.methods.service import LicenceGate
from app.registry.methods.wiring import MethodServices
from app.registry.models.deploy_targets import DeployTargets
from app.registry.models.service import Models
from app.registry.nodes.queues import Queues
from app.store.home import Home
from app.store.session import Database

AfterCommit = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Services:
    """Everything the routes call, built by `app.main` once for each project."""

    of: Callable[[str], "Services"]
    """Returns the services of another project."""
    licence: LicenceGate
    database: Database
    home: Home
    projects: Projects
    access_keys: AccessKeys
    secrets: Secrets
    audit: AuditTrail
    methods: MethodServices
    base_models: BaseModels
    datasets: Datasets
    dataset_mixes: DatasetMixes
    deploy_targets: DeployTargets
    queues: Queues
    environments: Environments
    allow_lists: AllowLists
    nodes: NodeActions
    models: Models
    model_registration: ModelRegistration
    code_approval: JobCodeApproval
    submissions: Submissions
    job_actions: JobActions
    inference_requests: InferenceRequests
    chat: ChatService
    row_previews: RowPreviews
    stage_commands: StageCommands
    streams: JobStreams
    notifier: Notifier
    webhooks: Webhooks
    webhook_sender: WebhookSender
    housekeeper: Housekeeper


async def get_services(request: Request) -> Services:
    """Return the services of the project that the request is about."""
    services: Services = request.app.state.services
    project = request.scope.get(PROJECT, DEFAULT_PROJECT)
    return services if project == DEFAULT_PROJECT else services.of(project)


ServicesDep = Annotated[Services, Depends(get_services)]
CallerDep = Annotated[Caller, Depends(caller_of)]


# of the request, not of `ServicesDep`: FastAPI would take a dependency apart once more for each route
async def _reading(request: Request) -> AsyncIterator[AsyncSession]:
    async with (await get_services(request)).database.reading() as session:
        yield session


async def _writing(request: Request) -> AsyncIterator[AsyncSession]:
    async with (await get_services(request)).database.writing() as session:
        yield session
        fault_point("before-commit")
    for callback in session.info.pop("after_commit", ()):
        await callback()


def after_commit(session: AsyncSession, callback: AfterCommit) -> None:
    """Run `callback` once the session's transaction is committed; a rollback drops it."""
    session.info.setdefault("after_commit", []).append(callback)


def notify_after_commit(session: AsyncSession, notifier: Notifier, job_id: str) -> None:
    """Notify the nodes of the job once its row is committed."""

    async def notify() -> None:
        fault_point("committed")
        notifier.notify(job_id)

    after_commit(session, notify)


# scope="function": with the default scope a failing commit would come after a response that said "created"
ReadSession = Annotated[AsyncSession, Depends(_reading, scope="function")]
WriteSession = Annotated[AsyncSession, Depends(_writing, scope="function")]
