"""Composition root of the API: `uvicorn --factory app.main:create_app`.

Reads the settings, builds the services and hands them to the routes. Starting is idempotent and may be done by several
processes at once: it brings the schema up to date and installs the preset methods of this installation's platforms.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from importlib.metadata import version
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, Protocol

from fastapi import FastAPI

from app import collect_as_usual
from app.access.audit import EVERY_SECONDS as AUDIT_SECONDS
from app.access.audit import AuditTrail
from app.access.guard import LicenceGuard, LicenceRecord
from app.access.keys import AccessKeys
from app.access.licence import load_public_key
from app.access.persons import PersonOptions, Persons
from app.access.projects import ProjectLicence, Projects
from app.access.secrets import SecretKeys, Secrets
from app.access.signing_keys import SigningKeys, document_of
from app.api.application import HttpOptions, Lifespan, new_application
from app.api.dependencies import Services
from app.api.guards import AccessPolicy, FindCaller
from app.api.limits import CallerLimits
from app.api.prometheus import Metrics
from app.api.routes import (
    access,
    audit,
    base_models,
    chat,
    code_reviews,
    datasets,
    deploy_targets,
    environments,
    housekeeping,
    jobs,
    methods,
    metrics,
    models,
    nodes,
    pictures,
    presets,
    projects,
    queues,
    scripts,
    secrets,
    system,
    webhooks,
)
from app.api.routes.system import Readiness
from app.api.schemas.access import Login, OidcLogin
from app.domain.access import Permission
from app.domain.audit import Action, acting
from app.domain.enums import Platform
from app.domain.errors import Violation
from app.domain.projects import DEFAULT_PROJECT, EVERY_PROJECT, Scope
from app.domain.retention import Retention, RetentionTarget
from app.executor.jobs.base_model_builds import BaseModelDownloads
from app.executor.jobs.chat_service import ChatService
from app.executor.jobs.code_approval import JobCodeApproval
from app.executor.jobs.failure_suggestions import FailureSuggestions
from app.executor.jobs.inference_requests import InferenceRequests
from app.executor.jobs.job_actions import JobActions
from app.executor.jobs.model_registration import ModelRegistration
from app.executor.jobs.row_previews import RowPreviews
from app.executor.jobs.stage_commands import StageCommands
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.jobs.submission import Submissions
from app.executor.jobs.token_lengths import TokenLengths
from app.executor.maintenance.background import Stopping, Work, in_background, keep_doing
from app.executor.maintenance.housekeeping import Housekeeper
from app.executor.maintenance.webhook_sender import WebhookSender
from app.executor.maintenance.webhooks import Webhooks
from app.executor.nodes.disk_guard import DiskGuard
from app.executor.nodes.joining import set_join_token
from app.executor.nodes.node_actions import NodeActions
from app.executor.nodes.notifier import FileNotifier, Notifier
from app.executor.runs.observe import RunObserver
from app.executor.runs.stream import JobStreams
from app.observability import configure_logging
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.registry.base_models.service import BaseModels
from app.registry.datasets.mixes import DatasetMixes
from app.registry.datasets.service import Datasets
from app.registry.environments.allow_lists import AllowLists
from app.registry.environments.service import Environments
from app.registry.methods.service import LicenceGate
from app.registry.methods.wiring import method_services
from app.registry.models.deploy_targets import DeployTargets
from app.registry.models.service import Models
from app.registry.nodes.platforms import this_machine
from app.registry.nodes.queues import Queues
from app.registry.nodes.service import living_nodes
from app.secret_values import hide_secrets
from app.settings import Settings, load_settings
from app.store.audit_records import record_setting
from app.store.code_reviews import policy_of, set_policy
from app.store.home import Home
from app.store.migrate import upgrade
from app.store.projects import all_ids
from app.store.session import Database

if TYPE_CHECKING:
    from app.executor.maintenance.webhook_post import WebhookClient

collect_as_usual()  # here, so that an exit does not go over what was imported either: a third of a short process

logger = logging.getLogger(__name__)

# the most used first: routes are tried one by one
ROUTERS: Final = tuple(
    module.router
    for module in (
        system, jobs, methods, models, chat, nodes, scripts, presets, datasets, base_models, environments, queues,
        deploy_targets, webhooks, pictures, metrics, housekeeping, access, secrets, projects, code_reviews,
        audit,
    )
)  # fmt: skip
IDEMPOTENCY_KEPT = timedelta(days=1)
_THREADS = 32


class Licence(LicenceGate, ProjectLicence, Protocol):
    """What a licence decides here."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the application; `SettingsError` when the settings cannot be used."""
    if settings is None:  # one of several processes of `deepe serve`
        settings = load_settings()
        hide_secrets()
    configure_logging(level=settings.log_level, form=settings.log_format)
    database = Database(settings.database_url, scope=EVERY_PROJECT)
    licence = LicenceGuard(Home(settings.home).licence, load_public_key(settings.license_public_key), utc_now)
    services = build_services(settings, database, licence=licence, clock=utc_now)
    checks = _optional_checks(settings)
    metrics_ = Metrics(database, redis=checks.get("redis"))
    record = LicenceRecord(database, licence)
    works: list[Work] = [partial(_watch_licence, record)]
    lifespan = _lifespan(services, database, settings, works)
    persons = _persons(settings)
    options = _http_options(settings, services, metrics_, persons, notices=licence.notices)
    app = new_application(options, lifespan=lifespan)
    app.state.metrics = metrics_
    app.state.services = services
    app.state.licence = licence
    app.state.licence_record = record
    app.state.login = _login(settings)
    app.state.readiness = Readiness(database=database.ping, optional=checks)
    include_routes(app)
    if settings.runner_port is not None:
        works.append(_add_runner(app, settings, services, persons, port=settings.runner_port))
    return app


def build_services(
    settings: Settings,
    database: Database,
    *,
    licence: Licence,
    clock: Callable[[], datetime],
    machine: Platform | None = None,
    notifier: Notifier | None = None,
) -> Services:
    """Wire the services; `machine` is the platform to install presets for, by default this machine's.

    `notifier` takes the place of the one that the settings name.
    """
    installation, whole = Home(settings.home), database.of(EVERY_PROJECT)
    notifier = notifier or _notifier(settings, whole)
    addresses = AddressPolicy(settings.webhook_addresses)
    shared = Shared(
        licence=licence,
        clock=clock,
        machine=machine or this_machine(),
        notifier=notifier,
        projects=Projects(database=whole, licence=licence, clock=clock),
        access_keys=AccessKeys(database=whole, clock=clock),
        secrets=Secrets(SecretKeys(installation.secrets_key, settings.given_secrets_key), clock=clock),
        audit=AuditTrail(database=whole, clock=clock),
        webhooks=Webhooks(policy=addresses),
        webhook_sender=WebhookSender(whole, lambda: _webhook_client(addresses)),
        housekeeper=Housekeeper(database=whole, home=installation, retention=_retention(settings)),
    )

    @cache
    def of(project: str) -> Services:
        home, rows = installation.of(project), database.of(Scope(project))
        return _services_of_project(settings, shared, of, database=rows, home=home)

    return of(DEFAULT_PROJECT)


@dataclass(frozen=True)
class Shared:
    """What the services of all projects have in common."""

    licence: Licence
    clock: Callable[[], datetime]
    machine: Platform
    notifier: Notifier
    projects: Projects
    access_keys: AccessKeys
    secrets: Secrets
    audit: AuditTrail
    webhooks: Webhooks
    webhook_sender: WebhookSender
    housekeeper: Housekeeper


def _services_of_project(
    settings: Settings, shared: Shared, of: Callable[[str], Services], *, database: Database, home: Home
) -> Services:
    clock, notifier = shared.clock, shared.notifier
    methods_ = method_services(
        home=home,
        licence=shared.licence,
        clock=clock,
        machine=shared.machine,
        platform=settings.platform,
        max_script_bytes=settings.max_script_bytes,
        samples=settings.samples,
    )
    datasets_ = Datasets(
        home=home, max_characters=settings.dataset_max_line, max_bytes=settings.max_upload_bytes, clock=clock
    )
    mixes = DatasetMixes(database=database, home=home, datasets=datasets_, max_bytes=settings.max_upload_bytes)
    base_models_ = BaseModels(home=home, clock=clock, max_upload_bytes=settings.max_base_model_bytes)
    streams = JobStreams(database, home)
    targets = AddressPolicy(settings.target_addresses)
    parameters = StageParameters(methods_.reader)
    lengths = TokenLengths()
    approval = JobCodeApproval(database, methods_.code_reviews)
    submissions = Submissions(
        database=database,
        home=home,
        runs=methods_.runs,
        datasets=datasets_,
        mixes=mixes,
        base_models=base_models_,
        parameters=parameters,
        lengths=lengths,
        options=methods_.options,
        approval=approval,
        min_free_bytes=settings.min_free_bytes,
        clock=clock,
    )
    questions = InferenceRequests(database=database, methods=methods_, home=home, approval=approval, clock=clock)
    return Services(
        of=of,
        licence=shared.licence,
        database=database,
        home=home,
        projects=shared.projects,
        access_keys=shared.access_keys,
        secrets=shared.secrets,
        audit=shared.audit,
        methods=methods_,
        base_models=base_models_,
        datasets=datasets_,
        dataset_mixes=mixes,
        deploy_targets=DeployTargets(clock=clock, addresses=targets),
        queues=Queues(clock=clock),
        environments=Environments(clock=clock),
        allow_lists=AllowLists(Environments(clock=clock)),
        nodes=NodeActions(),
        models=Models(database=database, home=home, clock=clock, addresses=targets),
        model_registration=ModelRegistration(home=home, clock=clock),
        code_approval=approval,
        submissions=submissions,
        job_actions=JobActions(
            database=database,
            home=home,
            submissions=submissions,
            failure_suggestions=FailureSuggestions(parameters, home),
            observer=RunObserver(home),
            downloads=BaseModelDownloads(base_models=base_models_, home=home, clock=clock),
            clock=clock,
        ),
        inference_requests=questions,
        chat=ChatService(database, home, notifier, streams=streams, clock=clock),
        row_previews=RowPreviews(
            database=database,
            home=home,
            runs=methods_.runs,
            datasets=datasets_,
            base_models=base_models_,
            parameters=parameters,
            streams=streams,
            notifier=notifier,
            lengths=lengths,
            clock=clock,
        ),
        stage_commands=StageCommands(
            database=database,
            home=home,
            files=methods_.files,
            submissions=submissions,
            questions=questions,
            redis_url=settings.redis_url.get_secret_value() if settings.redis_url is not None else None,
            runner_port=settings.runner_port,
            grace_seconds=settings.stop_grace_seconds,
        ),
        streams=streams,
        notifier=notifier,
        webhooks=shared.webhooks,
        webhook_sender=shared.webhook_sender,
        housekeeper=shared.housekeeper,
    )


def include_routes(app: FastAPI) -> None:
    """Include every router."""
    for router in ROUTERS:
        app.include_router(router)


def utc_now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


def _lifespan(services: Services, database: Database, settings: Settings, works: Sequence[Work] = ()) -> Lifespan:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # by default there are few on a small machine, and a hostile script holds one for seconds
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="api")
        asyncio.get_running_loop().set_default_executor(threads)
        services.home.create()
        await upgrade(database)
        await _prepare(services, settings)
        logger.info("api_started")
        async with in_background(
            services.webhook_sender.run, services.housekeeper.run_now_and_then, _keep_up_audit(services.audit), *works
        ):
            yield
        await services.notifier.close()
        await database.close()
        logger.info("api_stopped")

    return lifespan


def _keep_up_audit(trail: AuditTrail) -> Work:
    async def keep_up(stopping: Stopping) -> None:
        await keep_doing(trail.keep_up, every=AUDIT_SECONDS, stopping=stopping, event="audit_trail_behind")
        await trail.finish()

    return keep_up


async def _prepare(services: Services, settings: Settings) -> None:
    with acting(Action("service", "service", "service", "start")):
        async with services.database.writing() as session:
            before = await policy_of(session)
            if await set_policy(session, settings.code_approval, now=utc_now()):
                logger.info("code_approval_changed", extra={"code_approval": settings.code_approval.value})
            await set_join_token(session, settings.join_token.get_secret_value() if settings.join_token else None)
            projects = await all_ids(session)
            if before is not settings.code_approval:
                said = before.value, settings.code_approval.value
                await record_setting(session, "code_approval", *said, now=utc_now())
        for project in projects:
            await _prepare_project(services.of(project))


async def _prepare_project(services: Services) -> None:
    services.home.create()
    async with services.database.writing() as session:
        await services.methods.presets.install_presets(session)
        await services.methods.code_reviews.look_at_all(session)
    await services.models.finish_deletions()
    await services.datasets.remove_abandoned_uploads()
    await asyncio.to_thread(services.base_models.uploads.remove_abandoned)


def _notifier(settings: Settings, database: Database) -> Notifier:
    if settings.redis_url is None:
        home = Home(settings.home)
        return FileNotifier(home.notify_file, fifos=home.wakeup_fifos)

    from app.executor.nodes.redis_notifier import RedisNotifier

    async def node_names() -> Sequence[str]:
        async with database.reading() as session:
            return [node.name for node in await living_nodes(session)]

    return RedisNotifier(settings.redis_url.get_secret_value(), nodes=node_names)


def _persons(settings: Settings) -> FindCaller | None:
    """Return what knows people by the tokens of the issuers that the settings name; None where they name none."""
    if not settings.oidc_issuers:
        return None
    places = zip_longest(settings.oidc_issuers, settings.oidc_keys, fillvalue="")
    persons = Persons(
        {issuer: SigningKeys(issuer, document_of(issuer, place)).find for issuer, place in places},
        PersonOptions(
            audiences=settings.oidc_audiences,
            algorithms=settings.oidc_algorithms,
            leeway=timedelta(seconds=settings.oidc_leeway_seconds),
            name_claims=settings.oidc_name_claims,
            role_claim=settings.oidc_role_claim,
            roles=settings.oidc_roles,
            default_role=settings.oidc_default_role,
        ),
    )
    return persons.caller


def _login(settings: Settings) -> Login:
    if not settings.oidc_client_id:
        return Login(oidc=None)
    scopes = settings.oidc_scopes.split()
    return Login(oidc=OidcLogin(issuer=settings.oidc_issuers[0], client_id=settings.oidc_client_id, scopes=scopes))


async def _watch_licence(record: LicenceRecord, stopping: Stopping) -> None:
    every = record.LOOKS_EVERY_SECONDS
    await keep_doing(record.look, every=every, stopping=stopping, event="licence_not_recorded")


def _add_runner(app: FastAPI, settings: Settings, services: Services, persons: FindCaller | None, *, port: int) -> Work:
    """Answer DeepExtension's backend on a port of its own; return what has to run beside the service."""
    # not at the top: few need it, and it brings the client of Redis
    from app.api.runner.application import ByPort, runner_application
    from app.api.runner.routes import RunnerRoutes
    from app.executor.attempts.script_status import NoScriptStatus, RedisScriptStatus
    from app.executor.jobs.runner_calls import MEND_SECONDS, RunnerCalls

    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
    runner = RunnerCalls(
        database=services.database,
        home=services.home,
        methods=services.methods,
        status=RedisScriptStatus(redis_url) if redis_url else NoScriptStatus(),
        notifier=services.notifier,
        clock=utc_now,
    )

    async def mend_keys(stopping: Stopping) -> None:
        await keep_doing(runner.mend_keys, every=MEND_SECONDS, stopping=stopping, event="status_keys_not_mended")

    application = runner_application(
        RunnerRoutes(runner=runner, chat=services.chat, home=services.home).routes(),
        AccessPolicy(
            token=settings.token,
            keys=services.access_keys.caller,
            persons=persons,
            allowed_hosts=settings.allowed_hosts,
            trusted_networks=settings.runner_clients,
            open_paths=("/health",),
            proxies=settings.trusted_proxies,
            refused=services.audit.refusals.note,
            needed=Permission.RUN,
        ),
        max_body_bytes=settings.max_body_bytes,
        metrics=app.state.metrics.http,
    )
    app.add_middleware(ByPort, port=port, application=application)
    return mend_keys


def _webhook_client(policy: AddressPolicy) -> "WebhookClient":
    from app.executor.maintenance.webhook_post import WebhookClient

    return WebhookClient(policy=policy)


def _retention(settings: Settings) -> Retention:
    def days(count: int) -> timedelta | None:
        return timedelta(days=count) if count else None

    return Retention(
        {
            RetentionTarget.FAILED_RUNS: days(settings.keep_failed_runs_days),
            RetentionTarget.QUESTION_RUNS: days(settings.keep_questions_days),
            RetentionTarget.CHECKPOINTS: days(settings.keep_checkpoints_days),
            RetentionTarget.SCRIPT_LOGS: days(settings.keep_logs_days),
            RetentionTarget.DELIVERIES: days(settings.keep_deliveries_days),
            RetentionTarget.IDEMPOTENCY_KEYS: IDEMPOTENCY_KEPT,
            RetentionTarget.AUDIT_RECORDS: days(settings.keep_audit_days),
        }
    )


def _http_options(
    settings: Settings,
    services: Services,
    metrics_: Metrics,
    persons: FindCaller | None,
    *,
    notices: Callable[[], Sequence[Violation]],
) -> HttpOptions:
    access = AccessPolicy(
        token=settings.token,
        keys=services.access_keys.caller,
        persons=persons,
        enter=services.projects.enter,
        metrics_token=settings.metrics_token.get_secret_value() if settings.metrics_token else None,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        proxies=settings.trusted_proxies,
        refused=services.audit.refusals.note,
    )
    uploads = (
        *scripts.script_uploads(settings.max_script_bytes),
        *datasets.dataset_uploads(settings.max_upload_bytes),
        *base_models.base_model_uploads(settings.max_base_model_bytes),
    )
    return HttpOptions(
        version=version("deepextension"),
        access=access,
        max_body_bytes=settings.max_body_bytes,
        uploads=uploads,
        limits=CallerLimits(
            requests_per_minute=settings.max_requests_per_minute, streams=settings.max_streams_per_caller
        ),
        metrics=metrics_.http,
        notices=notices,
    )


def _optional_checks(settings: Settings) -> dict[str, Callable[[], Awaitable[object]]]:
    disk = DiskGuard({"DEEPE_HOME": Home(settings.home).runs}, min_free_bytes=settings.min_free_bytes)
    if settings.redis_url is None:
        return {"disk": disk.require}
    from redis.asyncio import Redis

    client = Redis.from_url(settings.redis_url.get_secret_value(), socket_timeout=1, socket_connect_timeout=1)
    return {"redis": client.ping, "disk": disk.require}
