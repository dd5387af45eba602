"""Turn the calls of DeepExtension's backend into jobs, and jobs into what the backend looks for.

A call runs the registered method that has its file and environment at that stage, in the version of this moment. Where
there is none, the file of the script root is pinned for this job alone: no method is made, so that lists of methods
stay as people keep them. Nothing is refused for what DeepExtension's runner would have accepted: a job that cannot run
is stored as failed, with its reason.

The database is the truth of a task, its key in Redis a copy. The worker writes the key while it runs the script; the
API writes it before, and `mend_keys` after an end that no worker wrote.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobStatus, TrainingType
from app.domain.errors import AppError, Invalid
from app.domain.kinds import KINDS, ArgumentStyle, Stage
from app.domain.launchers import Launcher
from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import shown, storable, storable_document
from app.domain.rendering import ArgumentForm, filled_arguments, render_equals, render_pairs
from app.domain.runner_calls import MAX_KEY_LENGTH, PATHS, Call
from app.domain.script_parameters import ScriptParameters
from app.domain.stage_calls import StageCall, WorkingDirectory, stage_call
from app.domain.training_types import inference_form
from app.domain.transitions import TERMINAL
from app.executor.attempts.script_status import FAILED, RUNNING, SUCCESS, ScriptStatus
from app.executor.jobs.requests import MAX_NAME
from app.executor.nodes.notifier import Notifier
from app.executor.runs.job_spec import JobSpec, PinnedScript, RunnerCall, status_key
from app.executor.runs.log_file import tail_lines
from app.executor.runs.run_folder import RunFolder
from app.executor.runs.script_records import Record, write_end_record, write_records
from app.registry.methods.pins import PinnedFile, pin, shipped_content
from app.registry.methods.record import Method, method_of
from app.registry.methods.service import MethodMoved
from app.registry.methods.wiring import MethodServices
from app.registry.scripts.names import script_path
from app.store import job_queries, job_status
from app.store import jobs as store
from app.store import methods as method_store
from app.store.clock import database_now
from app.store.home import Home
from app.store.job_status import End
from app.store.methods import MethodNotFound
from app.store.nodes import all_nodes
from app.store.session import Database
from app.store.tables import EnvironmentRow, JobRow, MethodRow, MethodVersionRow

logger = logging.getLogger(__name__)

ASKING_PRIORITY: Final = -10
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
MEND_SECONDS: Final = 5.0
_SETTLED: Final = timedelta(seconds=5)  # the worker writes record and key a moment after the end
_MENDED: Final = timedelta(hours=1)
_MOST_PLANS: Final = 3
_OPTIONS_OF_DEPLOYMENT: Final = ("quantize", "template", "system", "parameters")
_SHOWN_LINES: Final = 2000
_SHOWN_BYTES: Final = 256 * 1024


@dataclass(frozen=True)
class Outcome:
    """A job that has ended: how its script exited, None if it never ran, and the end of what it printed."""

    job: JobRow
    exit_code: int | None
    lines: Sequence[str]

    @property
    def succeeded(self) -> bool:
        return self.job.status is JobStatus.SUCCEEDED


@dataclass(frozen=True)
class _Plan:
    """What a call runs: a method as it is and as it was edited, or a file alone. `end`: it cannot run."""

    stage: Stage
    newest: Method | None = None
    edited: Method | None = None
    pinned: PinnedFile | None = None
    form: StageCall = field(default_factory=StageCall)
    forms: Mapping[str, ArgumentForm] = field(default_factory=dict)
    words: Sequence[str] = ()
    platform: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    """Members of the call that do not reach the script."""
    end: End | None = None


class RunnerCalls:
    """The service behind the routes of DeepExtension's runner."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        methods: MethodServices,
        status: ScriptStatus,
        notifier: Notifier,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._home = home
        self._methods = methods
        self._status = status
        self._notifier = notifier
        self._clock = clock

    # ---- start ------------------------------------------------------------------------------------------------------

    async def start(self, call: Call, *, job_id: str | None = None) -> JobRow:
        """Queue the job of a call, or store it as failed if it cannot run."""
        if call.key is not None:
            # before the job is there: a worker that is quick must not find its own record replaced
            await self._status.launching(call.key)
        await asyncio.to_thread(self._write_first_records, call)
        try:
            job, end = await self._insert(call, job_id or str(uuid4()))
        except BaseException:
            if call.key is not None:
                await self._status.ended(call.key, succeeded=False)
            raise
        if end is None:
            self._notifier.notify(job.id)
        else:
            await self._tell_end(job, end)
        return job

    async def refuse(
        self, required: Sequence[str], *, key: str | None, seq: Any, started: str | None, as_failed: bool
    ) -> None:
        """Record a call that lacks members where the backend looks for its task; `as_failed`: in its status too."""
        records = [] if started is None else [(Record.STARTED, started)]
        records.append((Record.MISSING_PARAMETERS, ", ".join(required)))
        await asyncio.to_thread(write_records, self._home.logs, *records, task=key, seq=storable_document(seq))
        if key is not None and as_failed:
            await self._status.ended(key, succeeded=False)

    async def _insert(self, call: Call, job_id: str) -> tuple[JobRow, End | None]:
        for number in range(_MOST_PLANS):
            plan = await self._plan(call)
            if number == 0 and plan.ignored:
                records = [(Record.IGNORED_PARAMETERS, f"{name} is not passed to the script") for name in plan.ignored]
                await asyncio.to_thread(write_records, self._home.logs, *records, task=call.key, seq=call.seq)
            with contextlib.suppress(MethodMoved, MethodNotFound):  # edited or deleted meanwhile
                return await self._write(call, job_id, plan)
        return await self._write(call, job_id, replace(plan, newest=None))

    async def _plan(self, call: Call) -> _Plan:
        async with self._database.reading() as session:
            methods = await method_store.living_methods(session)
            environments = await _known_environments(session)
        plan = await asyncio.to_thread(self._choose, call, methods)
        if plan.end is None and call.environment not in environments:
            return replace(plan, end=_end(EndReason.ENV_MISSING, environment=shown(call.environment)))
        return plan

    async def _write(self, call: Call, job_id: str, plan: _Plan) -> tuple[JobRow, End | None]:
        async with self._database.writing() as session:
            method = None
            if plan.newest is not None:
                method = await self._methods.runs.record(session, plan.newest, plan.edited or plan.newest)
            job = self._job(call, job_id, plan, method)
            if KINDS[job.kind].is_inference:
                await job_status.cancel_comparisons(session, now=self._clock())
            await store.insert(session, [job])
            if plan.end is not None:
                await job_status.end_queued(session, job_id, plan.end, now=self._clock())
                job = await store.get(session, job_id)
        return job, plan.end

    # ---- what runs (in a thread) ------------------------------------------------------------------------------------

    def _choose(self, call: Call, methods: Sequence[tuple[MethodRow, MethodVersionRow]]) -> _Plan:
        try:
            path = script_path(call.file or "")
            plan = self._registered(call, path, methods) or _Plan(call.stages[0], pinned=self._pinned(path))
        except Invalid as error:
            return _Plan(call.stages[0], end=_no_script(call, error.detail()))
        if plan.pinned is None:
            return replace(plan, end=_no_script(call, ""))
        try:
            return self._called(call, plan, plan.pinned)
        except AppError as error:
            return replace(plan, end=_end(EndReason.SPAWN_FAILED, detail=error.detail()))

    def _registered(self, call: Call, path: str, methods: Sequence[tuple[MethodRow, MethodVersionRow]]) -> _Plan | None:
        """Return the method that has the file in the environment at a stage of the call."""
        in_root = self._methods.files.scripts.digest(path) is not None
        for row, version in methods:
            for stage in call.stages:
                pinned = version.files.get(stage)
                # a file of the users' comes before a shipped one of that name
                if (
                    pinned is None
                    or pinned["file"] != path
                    or pinned.get("committed")
                    or bool(pinned.get("shipped")) is in_root
                ):
                    continue
                method = method_of(row, version)
                if method.environment(stage) != call.environment:
                    continue
                try:
                    edited = self._methods.runs.as_edited(method)
                    return _Plan(stage, newest=method, edited=edited, pinned=edited.files[stage])
                except Invalid as error:  # edited into something that is no stage: it runs, and says so itself
                    logger.warning("method_not_pinned", extra={"method": row.name, "error": error.detail()})
        return None

    def _pinned(self, path: str) -> PinnedFile | None:
        """Return the file of the script root, else the shipped one of that name; its bytes are kept."""
        files = self._methods.files
        if files.scripts.digest(path) is not None:
            return files.keep_on_disk(path)
        content = shipped_content(path)
        if content is None:
            return None
        files.versions.put(content)
        return pin(path, content, shipped=True)

    def _called(self, call: Call, plan: _Plan, pinned: PinnedFile) -> _Plan:
        """Return the plan with what the script gets: as the method says, else as DeepExtension's runner calls it."""
        method, stage = plan.edited, plan.stage
        form = stage_call(method.definition, stage) if method is not None else StageCall()
        plan = replace(plan, form=form)
        if method is not None and form != StageCall():
            script = self._methods.reader.pinned(pinned)
            platform, parameters, ignored = self._values(call, method, stage, script)
            plan = replace(
                plan,
                forms=script.forms,
                platform=platform,
                parameters=parameters,
                ignored=ignored if form.is_explicit else (),
            )
        if form.is_explicit:
            return plan
        words, ignored = self._words(call, stage, method, pinned, form)
        return replace(plan, words=words, ignored=ignored)

    def _values(
        self, call: Call, method: Method, stage: Stage, script: ScriptParameters
    ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Return the values of the platform's placeholders, the parameters, and what has no place."""
        form = stage_call(method.definition, stage)
        names = filled_arguments(stage, inference_form(method.definition.training_type))
        given = {**call.values, **({"parameters": call.options} if call.has_options else {})}
        given = {name: self._placed(name, value) for name, value in storable_document(given).items()}
        platform = {name: value for name, value in given.items() if name in names}
        others = {name: value for name, value in given.items() if name not in names and value is not None}
        passed = {
            name: value
            for name, value in others.items()
            if form.passes(name)
            and (name in form.placed or not script.refuses_unknown or name in script.declared_names)
        }
        ignored = [name for name in others if name not in passed]
        asked = [name for name in _OPTIONS_OF_DEPLOYMENT if platform.get(name) not in (None, "", "None")]
        ignored += [name for name in asked if name not in form.platform_values]
        if call.has_options and call.options is None:
            ignored.append("parameters")
        return platform, passed, ignored

    def _placed(self, name: str, value: Any) -> Any:
        """Return a path of the caller's as one that holds anywhere, everything else as it is."""
        if name not in PATHS or not isinstance(value, str) or not value:
            return value
        path = self._home.seen_by_scripts(value)
        return str(path) if value.startswith(".") or path.exists() else value  # else it may be a name on a hub

    def _words(
        self, call: Call, stage: Stage, method: Method | None, pinned: PinnedFile, form: StageCall
    ) -> tuple[list[str], list[str]]:
        """Return the arguments as DeepExtension's runner writes them, and what the script does not get."""
        options = method.definition.arguments if method is not None else None
        only_declared = options is not None and options.declared_only
        arguments, ignored = dict(call.arguments), ["parameters"] if call.has_options else []
        if only_declared or call.optional or call.has_options:
            script = self._methods.reader.pinned(pinned)
            arguments |= {name: value for name, value in call.optional.items() if name in script.declared_names}
            declared = script.by_name().get("parameters")
            if call.options is not None and declared is not None and not declared.is_plain_text:
                arguments["parameters"], ignored = dict(call.options), []
            if only_declared and not script.partly_read:
                arguments = {name: value for name, value in arguments.items() if name in script.declared_names}
        if form.working_directory is not WorkingDirectory.SCRIPTS:
            arguments = {name: self._placed(name, value) for name, value in arguments.items()}
        pairs = call.pictures or KINDS[stage].argument_style is ArgumentStyle.PAIRS
        render = render_pairs if pairs else render_equals
        return render(arguments, false_as=options.false_as if options is not None else "False"), ignored

    # ---- what is written --------------------------------------------------------------------------------------------

    def _job(self, call: Call, job_id: str, plan: _Plan, method: Method | None) -> JobRow:
        stage, pinned = plan.stage, plan.pinned
        body = storable_document(dict(call.body))
        spec = JobSpec(
            training_type=TrainingType.IMAGE_GENERATION if call.pictures else TrainingType.CHAT,
            technique=method.definition.technique if method is not None else "",
            script=None if pinned is None else PinnedScript(**asdict(pinned)),
            call=plan.form,
            launcher=method.definition.launcher(stage) if method is not None else Launcher(),
            forms=dict(plan.forms),
            false_as=method.definition.arguments.false_as if method is not None else "False",
            effective=body,
            runner_call=RunnerCall(
                arguments=tuple(plan.words),
                platform=dict(plan.platform),
                parameters=dict(plan.parameters),
                status_key=call.key,
                seq=storable_document(call.seq),
                label=call.ended,
                output=call.output,
            ),
        )
        return store.new_job(
            id=job_id,
            kind=stage,
            name=shown(call.name, limit=MAX_NAME) or stage,
            environment=shown(call.environment, limit=MAX_NAME),
            launch=spec.document(),
            now=self._clock(),
            parameters=body,
            priority=ASKING_PRIORITY if KINDS[stage].is_inference else 0,
            external_id=call.key,
            method_id=method.id if method is not None else None,
            method_name=method.name if method is not None else None,
            method_version=method.version if method is not None else None,
        )

    def _write_first_records(self, call: Call) -> None:
        records = [(Record.PARAMETERS, text) for text in call.records]
        if call.started is not None:
            records.insert(len(call.records) if call.records_first else 0, (Record.STARTED, call.started))
        if records:
            write_records(self._home.logs, *records, task=call.key, seq=call.seq)

    async def _tell_end(self, job: JobRow, end: End) -> None:
        """Publish an end that no worker wrote."""
        spec = JobSpec.of(job)
        assert spec.runner_call is not None
        call = spec.runner_call
        if end.reason is EndReason.SCRIPT_MISSING and call.label is not None:
            missing = (Record.FILE_MISSING, str(end.params.get("file", "")))
            await asyncio.to_thread(write_records, self._home.logs, missing, task=call.status_key, seq=call.seq)
        await asyncio.to_thread(write_end_record, self._home, job, end)
        if call.status_key is not None:
            await self._status.ended(call.status_key, succeeded=end.status is JobStatus.SUCCEEDED)

    # ---- look -------------------------------------------------------------------------------------------------------

    async def status(self, key: str) -> Mapping[str, Any] | None:
        """Return the status of a task; None if nothing of this id was ever started.

        What the script said stands in Redis. The database answers where Redis lost the key or missed the end.
        """
        if len(key) > MAX_KEY_LENGTH or key != storable(key):
            return None
        record = await self._status.record(key)
        async with self._database.reading() as session:
            job = await job_queries.newest_named(session, key)
            now = await database_now(session)
        if job is None:
            return record
        if record is None or (_is_missed(job, now) and record.get("status") == RUNNING):
            return _record_of(job)
        return record

    async def wait(self, job_id: str) -> Outcome:
        """Wait until the job has ended; holds no thread and no connection meanwhile."""
        pause = _FIRST_PAUSE
        while True:
            async with self._database.reading() as session:
                job = await store.get(session, job_id)
                attempts = await store.attempts_of(session, job_id) if job.status in TERMINAL else ()
                now = await database_now(session)
            if job.status in TERMINAL and await self._is_published(job, now):
                break
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        last = attempts[-1].row if attempts else None
        exit_record = last.exit if last is not None and last.exit is not None else {}
        run = RunFolder(self._home.run_folder(job_id, job.attempts))
        lines = await asyncio.to_thread(tail_lines, run.output_log, _SHOWN_LINES, max_bytes=_SHOWN_BYTES)
        return Outcome(job=job, exit_code=exit_record.get("code"), lines=lines)

    async def _is_published(self, job: JobRow, now: datetime) -> bool:
        """Say whether the end stands where the backend looks for it, or will not come there; nothing else writes it."""
        key = status_key(job)
        if key is None or await self._status.read(key) != RUNNING:
            return True
        if not _is_missed(job, now):
            return False
        await self._mend(job)
        return True

    async def _mend(self, job: JobRow) -> None:
        """Publish the end of a job, unless its task was started again."""
        assert job.reason is not None
        async with self._database.reading() as session:
            newest = await job_queries.newest_named(session, job.external_id or "")
        if newest is not None and newest.id == job.id:
            await self._tell_end(job, End(status=job.status, reason=job.reason, params=job.reason_params))

    async def mend_keys(self) -> None:
        """Publish ends that no worker wrote: of jobs cancelled in the queue, of lost nodes, while Redis was away."""
        async with self._database.reading() as session:
            now = await database_now(session)
            ended = await job_queries.named_that_ended(session, after=now - _MENDED, before=now - _SETTLED)
        for job in ended:
            if await self._status.read(job.external_id or "") == RUNNING:
                await self._mend(job)


async def _known_environments(session: AsyncSession) -> frozenset[str]:
    registered = (await session.exec(select(EnvironmentRow.name))).all()
    on_nodes = [name for node in await all_nodes(session) for name in node.environments]
    return frozenset([BASE_ENVIRONMENT, *registered, *on_nodes])


def _is_missed(job: JobRow, now: datetime) -> bool:
    """Say whether the job has ended and no worker is about to publish that."""
    return job.finished_at is not None and (job.attempts == 0 or job.finished_at < now - _SETTLED)


def _no_script(call: Call, detail: str) -> End:
    return _end(EndReason.SCRIPT_MISSING, file=shown(call.file or ""), detail=detail)


def _end(reason: EndReason, **params: Any) -> End:
    return End(status=JobStatus.FAILED, reason=reason, params=storable_document(params))


def _record_of(job: JobRow) -> dict[str, Any]:
    if job.status not in TERMINAL:
        status = RUNNING
    else:
        status = SUCCESS if job.status is JobStatus.SUCCEEDED else FAILED
    changed = job.finished_at or job.updated_at
    return {"status": status, "updateTime": changed.isoformat(timespec="microseconds"), "pid": 0}
