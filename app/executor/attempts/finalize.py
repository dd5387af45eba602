"""The end of an attempt: judge it, keep what it made, write the end and all that follows from it in one transaction.

Everything slow (reading the log's tail, checking and hashing weights) happens before the transaction. Finalizing may be
cancelled, or cut off by a crash, at any point and is then repeated: files are written atomically, and the transaction
changes nothing the second time, because the attempt's token is no longer that of a live job. An attempt that failed
may leave its job in the queue for another one instead of ending it (`app.domain.retries`). What comes after the
transaction (the model card, the status key) is made up for by `follow_up`, as long as the attempt's control folder is
there.

What is in the way for a while (the database, the disk) is met with patience. An end that cannot be written because of
what it holds is tried `MAX_TRIES` times and then written without the result, as `result_not_recorded`.
"""

import asyncio
import logging
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.kinds import KINDS, as_stage
from app.domain.plain_text import shown
from app.domain.retries import Again, Limits
from app.domain.transitions import TERMINAL
from app.executor.attempts.artifacts import Artifact, ResultManifest, digest_files, write_result
from app.executor.attempts.checkpoints import newest_checkpoint
from app.executor.attempts.comparisons import after, answer_of, quiet
from app.executor.attempts.limits import limit_seconds
from app.executor.attempts.model_card import make_way
from app.executor.attempts.produced_models import create_model, write_card
from app.executor.attempts.projections import project_whole_log
from app.executor.attempts.results import (
    MAX_DETAIL,
    Verdict,
    judge,
    judge_base_model,
    judge_build,
    judge_program,
    with_unpinned,
)
from app.executor.attempts.retrying import decide_on
from app.executor.attempts.script_status import FAILED, SUCCESS, ScriptStatus
from app.executor.engines.base import SUPERVISOR_TERMINATED, ExitRecord, ExitWhy
from app.executor.runs.evaluations import Reached, reached
from app.executor.runs.job_spec import JobSpec, is_comparison, is_runner_call, status_key
from app.executor.runs.log_file import tail_lines
from app.executor.runs.memory_forecasts import Device, measured_memory
from app.executor.runs.redaction import finish
from app.executor.runs.run_folder import RunFolder
from app.executor.runs.script_records import write_end_record
from app.faults import fault_point
from app.store import base_models, job_attempts, job_status, models
from app.store import jobs as store
from app.store.clock import database_now
from app.store.home import Home
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.session import Database
from app.store.tables import AttemptRow, JobRow, ModelRow, NodeRow
from app.store.transient import is_transient

logger = logging.getLogger(__name__)

TAIL_LINES = 2000  # enough to judge by
SHOWN_LINES = 20  # kept with the job
MAX_TRIES = 5  # of an end that fails for a reason that does not pass by itself


@dataclass(frozen=True)
class Judged:
    """The verdict, and what is needed to write it down."""

    verdict: Verdict
    log_tail: tuple[str, ...]
    reached: Reached


class StageFinalizer:
    """Finalizes the attempts of one node."""

    def __init__(self, *, database: Database, home: Home, status: ScriptStatus, compare_answers: bool = False) -> None:
        self._database = database
        self._home = home
        self._status = status
        self._compare_answers = compare_answers
        self._failures: dict[str, int] = {}

    async def finalize(self, claim: Claim, exit_record: ExitRecord) -> None:
        """Write the end of an attempt whose supervisor recorded an exit. The caller repeats it while this raises."""
        try:
            await self._finalize(claim, exit_record)
        except Exception as error:
            if is_transient(error):
                raise
            tries = self._failures[claim.attempt.id] = self._failures.get(claim.attempt.id, 0) + 1
            if tries < MAX_TRIES:
                raise
            logger.exception("result_not_recorded", extra={"job_id": claim.job.id, "attempt": claim.attempt.number})
            await self._finish_without_result(claim, exit_record, error)
        self._failures.pop(claim.attempt.id, None)

    async def _finalize(self, claim: Claim, exit_record: ExitRecord) -> None:
        if _never_ran(exit_record) and await self._recover(claim, exit_record):
            return
        judged = await asyncio.to_thread(self._judge, claim, exit_record, await self._told(claim.job))
        verdict = judged.verdict
        again = None if verdict.succeeded else await self._decide(claim, exit_record, verdict.reason)
        if again is not None and await self._requeue(claim, _end(claim.job, exit_record, judged, None), again):
            return
        manifest = await self._manifest(claim, verdict) if verdict.succeeded else None
        saved = await self._saved(claim, verdict.saved) if verdict.saved is not None else None
        await self._finish(claim, exit_record, judged, manifest, saved)

    async def end_unlaunched(self, claim: Claim, end: End, *, final: bool) -> None:
        """Write the end of an attempt that has no exit; unless it is final, the job may be started again."""
        again = None if final else decide_on(claim.job, end.reason, ran=False)
        if again is not None and await self._requeue(claim, end, again):
            return
        end = quiet(claim.job, end)
        async with self._database.writing() as session:
            finished = await job_attempts.finish(session, claim, end, now=await database_now(session))
        if finished:
            await self._ended(claim.job, end, attempt=claim.attempt.number)

    async def follow_up(self, attempt_id: str) -> None:
        """Write what follows from an end that is in the database already; safe to repeat."""
        async with self._database.reading() as session:
            attempt = await session.get(AttemptRow, attempt_id)
            job = await store.get(session, attempt.job_id) if attempt is not None else None
            saving = await store.next_saving(session, job) if job is not None else None
        if attempt is None or job is None or job.status not in TERMINAL or attempt.number != job.attempts:
            return
        await self._follow_up(job)
        if saving is not None and saving.reason is EndReason.ALREADY_SAVED:
            await self._follow_up(saving)

    async def _follow_up(self, job: JobRow) -> None:
        async with self._database.reading() as session:
            model = await models.find_model(session, job.result_model_id) if job.result_model_id else None
        await self._tell_status(job, succeeded=job.status is JobStatus.SUCCEEDED)
        if model is not None and model.deleted_at is None:
            await asyncio.to_thread(self._write_card, job, model)

    async def _decide(self, claim: Claim, exit_record: ExitRecord, reason: EndReason) -> Again | None:
        if exit_record.why is ExitWhy.STOPPED and exit_record.stop_reason == SUPERVISOR_TERMINATED:
            reason = EndReason.SUPERVISOR_LOST  # a machine that shuts down in order is a lost one all the same
        progressed = reason is EndReason.TIMED_OUT and await self._progressed(claim)
        return decide_on(claim.job, reason, ran=True, progressed=progressed)

    async def _progressed(self, claim: Claim) -> bool:
        """Say whether the attempt left a checkpoint that is farther than the one it began with."""
        newest = await asyncio.to_thread(newest_checkpoint, self._home, claim.job.id)
        async with self._database.reading() as session:
            attempt = await session.get(AttemptRow, claim.attempt.id)
        begun = attempt.resumed_from["step"] if attempt is not None and attempt.resumed_from else 0
        return newest is not None and newest.step > begun

    async def _recover(self, claim: Claim, exit_record: ExitRecord) -> bool:
        """Have a script started again that never ran; False: it was tried often enough, or is not wanted any more."""
        again = decide_on(claim.job, EndReason.SUPERVISOR_LOST, ran=False)
        end = End(
            status=JobStatus.FAILED,
            reason=EndReason.SUPERVISOR_LOST,
            params={"detail": exit_record.error or ""},
            exit=asdict(exit_record),
        )
        return again is not None and await self._requeue(claim, end, again)

    async def _requeue(self, claim: Claim, end: End, again: Again) -> bool:
        """End the attempt, not its job. False: the claim was lost, or a cancel was requested."""
        async with self._database.writing() as session:
            now = await database_now(session)
            changed = await job_attempts.requeue(
                session, claim, reason=end.reason, now=now, again=again, params=end.params, exit_record=end.exit
            )
        if not changed:
            return False
        fault_point("requeued")
        logger.warning(
            "job_tried_again",
            extra={
                "job_id": claim.job.id,
                "attempt": claim.attempt.number,
                "reason": end.reason,
                "charged": again.charged,
                "delay_seconds": again.delay.total_seconds(),
            },
        )
        return True

    async def _finish(
        self,
        claim: Claim,
        exit_record: ExitRecord,
        judged: Judged,
        manifest: ResultManifest | None,
        saved: ResultManifest | None = None,
    ) -> None:
        ended: _Unlaunched | None = None
        try:
            async with self._database.writing() as session:
                now = await database_now(session)
                parent = await models.find_model(session, claim.job.model_id) if claim.job.model_id else None
                made = manifest if judged.verdict.succeeded else None
                model = await create_model(session, claim.job, parent, made, judged.reached, now=now)
                await self._record_base_model(session, claim, judged, now=now)
                # read again: a cancel may have been requested meanwhile
                end = _end(await store.get(session, claim.job.id), exit_record, judged, model)
                if end.status is JobStatus.SUCCEEDED and claim.job.kind is JobKind.TRAINING:
                    node = await session.get_one(NodeRow, claim.attempt.node_id)
                    device = Device.of(node, claim.attempt.accelerators)
                    end = replace(end, memory=measured_memory(judged.reached.metrics, device))
                if not await job_attempts.finish(session, claim, end, now=now):
                    raise _ClaimLost  # rolls the model back
                if self._compare_answers:
                    await after(session, claim.job, end, now=now)
                if saved is not None and model is not None:
                    ended = await self._end_saving(session, saved, model, now=now)
                fault_point("before-finish")
        except _ClaimLost:
            logger.warning("stale_end_dropped", extra={"job_id": claim.job.id, "attempt": claim.attempt.number})
            return
        fault_point("after-finish")
        await self._ended(claim.job, end, attempt=claim.attempt.number)
        if model is not None:
            await asyncio.to_thread(self._write_card, claim.job, model)
        if ended is not None:
            await self._ended(ended.job, ended.end, attempt=0)
            await asyncio.to_thread(self._write_card, ended.job, ended.model)

    async def _end_saving(
        self, session: AsyncSession, saved: ResultManifest, parent: ModelRow, *, now: datetime
    ) -> "_Unlaunched | None":
        """End the saving job that has nothing to do any more, with the complete model; None: it was cancelled."""
        job = await store.get(session, saved.job_id)
        if job.status is not JobStatus.QUEUED:
            return None
        model = await create_model(session, job, parent, saved, Reached((), {}), now=now)
        assert model is not None
        params = {"path": saved.root, "training": parent.job_id}
        end = End(JobStatus.SUCCEEDED, EndReason.ALREADY_SAVED, params, result_model_id=model.id)
        await job_status.succeed_unlaunched(session, job.id, end, now=now)
        return _Unlaunched(job, end, model)

    async def _finish_without_result(self, claim: Claim, exit_record: ExitRecord, error: Exception) -> None:
        async with self._database.writing() as session:
            cancelled = (await store.get(session, claim.job.id)).cancel_requested_at is not None
            end = End(
                status=JobStatus.CANCELLED if cancelled else JobStatus.FAILED,
                reason=EndReason.CANCELLED if cancelled else EndReason.RESULT_NOT_RECORDED,
                params={"detail": shown(f"{type(error).__name__}: {error}", limit=MAX_DETAIL)},
                exit=asdict(exit_record),
            )
            finished = await job_attempts.finish(session, claim, end, now=await database_now(session))
        if finished:
            await self._ended(claim.job, end, attempt=claim.attempt.number)

    async def _ended(self, job: JobRow, end: End, *, attempt: int) -> None:
        # the record before the status: who sees the end finds it
        await asyncio.to_thread(write_end_record, self._home, job, end)
        await self._tell_status(job, succeeded=end.status is JobStatus.SUCCEEDED)
        logger.info(
            "job_ended", extra={"job_id": job.id, "attempt": attempt, "status": end.status, "reason": end.reason}
        )

    async def _told(self, job: JobRow) -> int | None:
        """Return the status that the script set in Redis."""
        key = _counting_key(job)
        return None if key is None else await self._status.read(key)

    async def _tell_status(self, job: JobRow, *, succeeded: bool) -> None:
        if (key := status_key(job)) is not None:
            await self._status.ended(key, succeeded=succeeded)

    # ---- judging (in a thread) --------------------------------------------------------------------------------------

    def _judge(self, claim: Claim, exit_record: ExitRecord, redis_status: int | None) -> Judged:
        home = self._home.of(claim.job.project_id)
        run = RunFolder(home.run_folder(claim.job.id, claim.attempt.number))
        finish(run)  # first: all that is kept of the attempt is read from here
        tail = tuple(tail_lines(run.output_log, TAIL_LINES))
        project_whole_log(run)
        said = reached(run)
        if claim.job.kind is JobKind.ENVIRONMENT:
            verdict = judge_build(exit_record, tail)
        elif claim.job.kind is JobKind.BASE_MODEL:
            verdict = judge_base_model(exit_record, tail, self._base_model_folder(claim), root=home.models)
        elif claim.job.kind is JobKind.PREVIEW:
            verdict = judge_program(exit_record, tail)
        else:
            spec = JobSpec.of(claim.job)
            if run.output.is_symlink():  # files of others in the folder's place are no output of this stage
                run.output.unlink()
                run.output.mkdir()
            verdict = judge(
                claim.job.kind,
                exit_record,
                log_tail=tail,
                script_status=_script_status(claim.job, redis_status, said),
                output_dir=None if is_runner_call(claim.job) else run.output,
                output=spec.output,
                produces=claim.job.model_id is None and not is_runner_call(claim.job),
            )
            verdict = with_unpinned(verdict, spec, home.scripts)
            if verdict.succeeded and is_comparison(claim.job):
                verdict = replace(verdict, params={"answer": answer_of(tail)})
        return Judged(verdict=verdict, log_tail=tail[-SHOWN_LINES:], reached=said)

    async def _manifest(self, claim: Claim, verdict: Verdict) -> ResultManifest | None:
        """Write down what a stage that succeeded made, byte for byte."""
        if not KINDS[claim.job.kind].is_stage:
            return None
        result = dict(verdict.result) if verdict.result else None
        manifest = await self._listed(claim.job, claim.attempt.number, verdict.artifact, result)
        run = RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
        fault_point("before-publish")
        await asyncio.to_thread(write_result, run.result, manifest)
        fault_point("after-publish")
        return manifest

    async def _listed(
        self, job: JobRow, attempt: int, artifact: Artifact | None, result: dict[str, Any] | None
    ) -> ResultManifest:
        if artifact is not None:
            await asyncio.to_thread(make_way, artifact.root)
        return ResultManifest(
            job_id=job.id,
            attempt=attempt,
            stage=as_stage(job.kind),
            kind=artifact.kind if artifact else None,
            root=self._home.relative(artifact.root) if artifact else None,
            files=await digest_files(artifact.root) if artifact else (),
            created_at=datetime.now(UTC),
            result=result,
        )

    async def _saved(self, claim: Claim, artifact: Artifact) -> ResultManifest | None:
        """Return the complete model that the training wrote, if a saving job waits for the training to make it."""
        async with self._database.reading() as session:
            saving = await store.next_saving(session, claim.job)
        waits = saving is not None and saving.status is JobStatus.QUEUED and saving.blocked_by == claim.job.id
        return await self._listed(saving, 0, artifact, None) if saving is not None and waits else None

    # ---- the model --------------------------------------------------------------------------------------------------

    def _base_model_folder(self, claim: Claim) -> Path:
        base = JobSpec.of(claim.job).base_model
        assert base is not None
        return self._home.absolute(base.path)

    async def _record_base_model(self, session: AsyncSession, claim: Claim, judged: Judged, *, now: datetime) -> None:
        """Write what a job made into the row of its base model, before the job's own: see `base_model_builds`."""
        if judged.verdict.card is not None and claim.job.base_model_id is not None:
            await base_models.record_built(session, claim.job.base_model_id, card=judged.verdict.card, now=now)

    def _write_card(self, job: JobRow, model: ModelRow) -> None:
        """Write the card of a model in the home folder, from its rows in the database. Never raises."""
        try:
            write_card(self._home, job, model)
        except Exception as error:  # the model is as good without it, and its end is written
            logger.warning(
                "model_card_not_written",
                extra={"job_id": job.id, "error": str(error)},
                exc_info=not isinstance(error, OSError),
            )


@dataclass(frozen=True)
class _Unlaunched:
    """A job that ended without an attempt, and the model that it was to make."""

    job: JobRow
    end: End
    model: ModelRow


class _ClaimLost(Exception):
    """The attempt's token is stale: it was ended elsewhere."""


def _counting_key(job: JobRow) -> str | None:
    """Return the key whose status counts; what is set for a call of the backend counts in trainings only."""
    return None if is_runner_call(job) and not KINDS[job.kind].reports_pid else status_key(job)


def _script_status(job: JobRow, in_redis: int | None, said: Reached) -> int | None:
    """Return the status that the script set; where Redis was away, its events have it."""
    key = _counting_key(job)
    return in_redis if key is None or in_redis in (SUCCESS, FAILED) else said.statuses.get(key)


def _never_ran(exit_record: ExitRecord) -> bool:
    return exit_record.why is ExitWhy.NEVER_STARTED


def _end(job: JobRow, exit_record: ExitRecord, judged: Judged, model: ModelRow | None) -> End:
    verdict = judged.verdict
    if verdict.succeeded:
        status = JobStatus.SUCCEEDED
    elif verdict.reason is EndReason.CANCELLED or (_never_ran(exit_record) and job.cancel_requested_at):
        status = JobStatus.CANCELLED
    else:
        status = JobStatus.FAILED
    limit = limit_seconds(Limits.of(job.limits), verdict.reason)
    more = {} if limit is None else {"limit_seconds": limit}
    end = End(
        status=status,
        reason=EndReason.CANCELLED if status is JobStatus.CANCELLED else verdict.reason,
        params={"detail": verdict.detail, **verdict.params, **more, "log_tail": list(judged.log_tail)},
        exit=asdict(exit_record),
        result_model_id=model.id if model else None,
    )
    return quiet(job, end)
