"""The node's agent: claims jobs, launches them, watches their attempts, ends them. One per node, by a lock.

It runs in `deepe worker` as the process's main loop. Nothing here runs a stage: the node's engine places it
(`app/executor/engines`), and it goes on when this process dies. A crash at any point is met by the next round, which
looks at rows and attempts again (`app/executor/attempts/reconcile.py`). What the engine keeps of an attempt goes last,
when nothing is left to write down.

A round talks to the database, every `poll_seconds` or at once after a notification. The engine notifies when an attempt
has something new to show; that may be lost, so attempts are observed every `watch_seconds`, which is cheap. An
error of the database or the disk ends a round once every attempt was advanced, and the next round is backed off; an
error of one attempt backs off that attempt only.

Finalizing may take many minutes (the weights are hashed). It holds up nothing: the processes of the attempt are gone,
so its slot is free, and its accelerators are given back. A worker that stops breaks it off, and the next one begins it
again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from app.domain.accelerators import Accelerator
from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.kinds import HOLDING_KINDS
from app.executor.attempts.forecast import Forecasts
from app.executor.attempts.launch import LaunchError, ending_on_disk_errors
from app.executor.attempts.limits import LimitWatch
from app.executor.attempts.projections import Projections
from app.executor.attempts.reconcile import Seen, Step, next_step
from app.executor.engines.base import AttemptState, Engine, ExitRecord, LaunchSpec
from app.executor.engines.local import clock_since_boot
from app.executor.nodes.backoff import TRANSIENT, backoff_seconds, log_failure
from app.executor.nodes.orphans import Orphans
from app.faults import fault_point
from app.store import claims, job_attempts, leases, nodes
from app.store import jobs as store
from app.store.claims import Offer
from app.store.clock import database_now
from app.store.environments import spec_hashes
from app.store.job_attempts import Claim
from app.store.job_status import End
from app.store.nodes import GONE_STATUSES, NODE_SILENT_AFTER, NodeStatus
from app.store.session import Database
from app.store.transient import is_transient

logger = logging.getLogger(__name__)

# A node whose heartbeat is this fresh cannot have been declared dead: what was claimed before may still be started.
SURE_SECONDS = NODE_SILENT_AFTER.total_seconds() - 10.0
SILENT_SECONDS = 30.0  # six missed beats of a supervisor
QUARANTINE_SECONDS = 10.0
LONG_FINALIZING_SECONDS = 1.0
PROJECTION_SECONDS = 0.5
LEAST_PAUSE_SECONDS = 0.02  # between two rounds, should a step have no effect
CLAIMED_AT_ONCE = 16  # what is claimed is started one after the other: leave the rest to other nodes meanwhile
STOPPING_SECONDS = 3.0  # how long a worker that stops waits for ends that are being written


class Launcher(Protocol):
    """Makes the launch of an attempt concrete; raises `LaunchError` when it cannot run."""

    async def resolve(self, claim: Claim) -> LaunchSpec: ...

    async def launched(self, claim: Claim, pid: int) -> None: ...


class Finalizer(Protocol):
    """Judges an ended attempt and writes the end, with all that follows from it, in one transaction."""

    async def finalize(self, claim: Claim, exit_record: ExitRecord) -> None: ...

    async def end_unlaunched(self, claim: Claim, end: End, *, final: bool) -> None:
        """Write the end of an attempt that has no exit; unless it is final, the job may be started again."""

    async def follow_up(self, attempt_id: str) -> None:
        """Write what follows from an end that is in the database, after a crash right behind it."""


class NodeReporter(Protocol):
    """Reports the node to the database, and knows the environments and accelerators that it can use."""

    async def beat(self) -> None: ...

    async def ready_environments(self, specs: Mapping[str, str | None]) -> Collection[str]:
        """Return the names of those that stages can run in here; `specs`: digests of the specifications."""

    async def usable_accelerators(self) -> Sequence[Accelerator]:
        """Return the accelerators that no foreign process uses now, those that attempts hold among them."""

    async def request_builds(self) -> None: ...


@dataclass(frozen=True)
class Pool:
    """A slot pool: the kinds of jobs that share its slots, so that an answer does not wait for a training of hours.

    A job that holds accelerators takes no slot; those bound it.
    """

    kinds: frozenset[JobKind]
    slots: int


@dataclass(frozen=True)
class Timing:
    """Seconds between looks; `lease` is what a claim promises until the next beat."""

    poll_seconds: float = 2.0
    watch_seconds: float = 0.5
    beat_seconds: float = 5.0
    lease: timedelta = timedelta(seconds=60)


class NodeAgent:
    """Moves the attempts of one node forward until it is told to stop; stages outlive it."""

    def __init__(
        self,
        *,
        database: Database,
        node_id: str,
        engine: Engine,
        pools: Sequence[Pool],
        launcher: Launcher,
        finalizer: Finalizer,
        reporter: NodeReporter,
        projections: Projections,
        forecasts: Forecasts,
        limits: LimitWatch,
        timing: Timing,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._node_id = node_id
        self._engine = engine
        self._pools = pools
        self._launcher = launcher
        self._finalizer = finalizer
        self._orphans = Orphans(engine, follow_up=finalizer.follow_up, monotonic=monotonic)
        self._reporter = reporter
        self._projections = projections
        self._forecasts = forecasts
        self._limits = limits
        self._timing = timing
        self._monotonic = monotonic
        self._woken = asyncio.Event()
        self._claims: dict[str, Claim] = {}
        self._finalizing: dict[str, asyncio.Task[None]] = {}
        self._backoffs: dict[str, _Backoff] = {}
        self._silent: set[str] = set()
        self._heard_at = float("-inf")
        self.removed = False
        self._last_beat = float("-inf")
        self._last_projection = float("-inf")
        self._last_quarantine_look = float("-inf")

    def wake(self) -> None:
        """Look at the database now: a notification arrived."""
        self._woken.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set. The caller holds the node's lock (`exclusive`)."""
        with self._engine.running(self.wake):
            await self._run(stopping)
        if self.removed:
            stopping.set()
        await self._finish_finalizing()

    async def _run(self, stopping: asyncio.Event) -> None:
        failures = 0
        while not stopping.is_set() and not self.removed:
            try:
                await self._round()
                await self._watch(stopping)
                failures = 0
            except Exception as error:
                failures += 1
                pause = backoff_seconds(failures)
                log_failure(logger, "agent_round_failed", error, {"node": self._node_id, "next_try_in": pause})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), timeout=pause)

    # ---- one round --------------------------------------------------------------------------------------------------

    async def _round(self) -> None:
        self._woken.clear()
        await self._beat()
        # Tasks that are done stay known until here: rows that were read before they ended must not be acted upon.
        self._finalizing = {key: task for key, task in self._finalizing.items() if not task.done()}
        async with self._database.reading() as session:
            status, live = await job_attempts.node_and_attempts(session, self._node_id)
        self._claims = {claim.attempt.id: claim for claim in live}
        self._backoffs = {key: backoff for key, backoff in self._backoffs.items() if key in self._claims}
        await self._advance_all(live)
        if status in GONE_STATUSES:
            self._orphans.look_again()  # whatever the engine has is an orphan now
        await self._orphans.clear(known=self._claims.keys() | self._finalizing.keys())
        await self._look_after_quarantine()
        if status in GONE_STATUSES and not self._orphans.exist:
            await self._return(status)
        if status is not NodeStatus.READY or self._orphans.exist:  # what runs goes on, nothing begins
            return
        async with self._database.reading() as session:  # a claim is a writing transaction: only if a job waits
            waiting = {demand.kind for demand in await store.waiting_demands(session)}
            specs = await spec_hashes(session) if waiting else {}
        for pool in self._pools:
            while pool.kinds & waiting and await self._claim(pool, specs):
                pass
        await self._reporter.request_builds()  # last: what can start need not wait for it

    async def _beat(self) -> None:
        if self._monotonic() - self._last_beat < self._timing.beat_seconds:
            return
        heard_at = clock_since_boot()
        await self._reporter.beat()
        ends = await self._forecasts.news(list(self._claims.values()))
        async with self._database.writing() as session:
            now = await database_now(session)
            await job_attempts.renew_leases(session, self._node_id, now=now, lease=self._timing.lease)
            await job_attempts.expect_ends(session, ends)
        self._heard_at, self._last_beat = heard_at, self._monotonic()

    async def _return(self, status: NodeStatus) -> None:
        """Live again after having been declared dead: every attempt of before has ended, and nothing of it is left.

        The jobs were given to other nodes, or ended. A removed node does not come back by itself.
        """
        if status is NodeStatus.REMOVED:
            self.removed = True
            return
        async with self._database.writing() as session:
            revived = await nodes.revive(session, self._node_id, now=await database_now(session))
        if revived:
            logger.warning("node_returned", extra={"node": self._node_id})
            self._last_quarantine_look = float("-inf")  # what it held may be free now
            self.wake()

    async def _claim(self, pool: Pool, specs: Mapping[str, str | None]) -> int:
        """Claim and launch what the pool has room for, in one transaction; return how many jobs that were.

        `specs`: the digests of the environments' specifications, as they are now.
        """
        usable = [one.id for one in await self._reporter.usable_accelerators()]
        slots = pool.slots - sum(self._takes_slot(claim, pool) for claim in self._claims.values())
        leasing = bool(usable) and bool(pool.kinds & HOLDING_KINDS)
        if slots <= 0 and not leasing:
            return 0
        offer = Offer(
            node_id=self._node_id,
            environments=await self._reporter.ready_environments(specs),
            slots=slots,
            usable=usable,
        )
        most = min(max(slots, 0) + (len(usable) if leasing else 0), CLAIMED_AT_ONCE)
        async with self._database.writing() as session:
            now = await database_now(session)
            won = await claims.claim_several(
                session, offer, kinds=pool.kinds, now=now, lease=self._timing.lease, most=most
            )
        for claim in won:
            fault_point("claimed")
            logger.info("job_claimed", extra=_ids(claim))
            self._claims[claim.attempt.id] = claim
        await self._advance_all(won)
        return len(won)

    def _takes_slot(self, claim: Claim, pool: Pool) -> bool:
        """Say whether the attempt takes one of the pool's slots; while it is finalized, nothing of it runs."""
        finalizing = claim.attempt.id in self._finalizing
        return claim.job.kind in pool.kinds and not claim.attempt.accelerators and not finalizing

    # ---- one attempt ------------------------------------------------------------------------------------------------

    async def _advance_all(self, claims: Sequence[Claim]) -> None:
        """Advance every attempt, then raise the first error that was met."""
        errors: list[Exception] = []
        for claim in claims:
            try:
                await self._advance(claim)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _advance(self, claim: Claim) -> None:
        """Do the next step of one attempt. A step that cannot be done must not hold up the others."""
        try:
            await self._do(self._step(claim), claim)
        except Exception as error:
            if is_transient(error):
                raise
            self._back_off(claim, "attempt_failed", error)

    async def _do(self, step: Step, claim: Claim) -> None:
        match step:
            case Step.WAIT:
                pass
            case Step.LAUNCH:
                await self._launch(claim)
            case Step.ADOPT:
                logger.warning("supervisor_died", extra=_ids(claim))
                await self._engine.recover(claim.attempt.id)
            case Step.MARK_RUNNING:
                await self._mark_running(claim)
            case Step.STOP:
                await self._stop(claim)
            case Step.END_UNSTARTED:
                await self._end_unstarted(claim)
            case Step.END_LOST:
                await self._end_lost(claim)
            case Step.FINALIZE:
                await self._finalize(claim)

    def _step(self, claim: Claim) -> Step:
        backoff = self._backoffs.get(claim.attempt.id)
        if claim.attempt.id in self._finalizing or (backoff is not None and self._monotonic() < backoff.until):
            return Step.WAIT
        state = self._engine.observe(claim.attempt.id)
        self._notice_silence(claim, state)
        seen = Seen(
            state=state,
            status=claim.job.status,
            cancel_requested=claim.job.cancel_requested_at is not None,
            overdue=self._limits.overdue(claim) is not None,
        )
        return next_step(seen)

    def _notice_silence(self, claim: Claim, state: AttemptState) -> None:
        """Tell once of a supervisor that lives and writes nothing: it is frozen, or its disk is full."""
        if not state.supervised or (state.heartbeat_age or 0.0) < SILENT_SECONDS:
            self._silent.discard(claim.attempt.id)
        elif claim.attempt.id not in self._silent:
            self._silent.add(claim.attempt.id)
            logger.warning("supervisor_silent", extra=_ids(claim) | {"seconds": state.heartbeat_age})

    async def _launch(self, claim: Claim) -> None:
        try:
            spec = await self._launcher.resolve(claim)
            fault_point("before-spec")
            with ending_on_disk_errors():
                await self._engine.prepare(claim.attempt.id, spec)
        except LaunchError as error:
            logger.warning("launch_refused", extra=_ids(claim) | {"reason": error.reason, **error.params})
            end = End(status=JobStatus.FAILED, reason=error.reason, params=error.params)
            await self._end_unlaunched(claim, end, final=False)
            return
        fault_point("after-spec")
        if clock_since_boot() - self._heard_at > SURE_SECONDS:
            return  # this process stood still: the job may be another node's by now; the next round looks
        await self._engine.place(claim.attempt.id)
        fault_point("supervisor-asked")

    async def _end_unstarted(self, claim: Claim) -> None:
        await self._engine.stop(claim.attempt.id, EndReason.CANCELLED)  # what is late must find that, not only a row
        end = End(status=JobStatus.CANCELLED, reason=EndReason.CANCELLED, params={})
        await self._end_unlaunched(claim, end, final=True)

    async def _end_lost(self, claim: Claim) -> None:
        """End a job whose folder is gone, but not while something of it lives."""
        strays = await self._engine.end_strays(claim.attempt.id)
        logger.warning("folder_lost", extra=_ids(claim) | {"processes": strays.ended, "unkillable": strays.unkillable})
        if strays.unkillable:
            raise RuntimeError(f"{strays.unkillable} processes of the attempt cannot be killed")
        # final: a process without our mark may be left, and the script must not run twice
        end = End(status=JobStatus.FAILED, reason=EndReason.SUPERVISOR_LOST, params={"detail": ""})
        await self._end_unlaunched(claim, end, final=True)

    async def _end_unlaunched(self, claim: Claim, end: End, *, final: bool) -> None:
        await self._finalizer.end_unlaunched(claim, end, final=final)
        self._forget(claim)

    async def _mark_running(self, claim: Claim) -> None:
        async with self._database.writing() as session:
            await job_attempts.mark_running(session, claim, now=await database_now(session))
        fault_point("running")
        await self._refresh(claim)
        pid = self._engine.observe(claim.attempt.id).pid
        if pid is not None:
            await self._launcher.launched(claim, pid)
        logger.info("job_running", extra=_ids(claim))

    async def _stop(self, claim: Claim) -> None:
        # the file first: after a crash in between, the next round writes the status
        requested = claim.job.cancel_requested_at is not None
        reason = EndReason.CANCELLED if requested else self._limits.overdue(claim) or EndReason.CANCELLED
        await self._engine.stop(claim.attempt.id, reason)
        fault_point("stop-asked")
        if claim.job.status is not JobStatus.STOPPING:
            async with self._database.writing() as session:
                await job_attempts.mark_stopping(session, claim, now=await database_now(session))
            fault_point("stopping")
            await self._refresh(claim)
            logger.info("job_stopping", extra=_ids(claim))

    async def _finalize(self, claim: Claim) -> None:
        exit_record = self._engine.observe(claim.attempt.id).exit
        assert exit_record is not None
        if claim.job.status is JobStatus.LAUNCHING and exit_record.started_at is not None:
            await self._mark_running(claim)  # it came and went between two looks
            claim = self._claims[claim.attempt.id]
        task = asyncio.create_task(self._finalize_and_forget(claim, exit_record), name=f"finalize {claim.job.id}")
        self._finalizing[claim.attempt.id] = task

    async def _finalize_and_forget(self, claim: Claim, exit_record: ExitRecord) -> None:
        finalized = asyncio.Event()
        early = asyncio.create_task(self._release_early(claim, exit_record, finalized))
        try:
            await self._finalizer.finalize(claim, exit_record)
            fault_point("finalized")
            self._forget(claim)
            self.wake()  # its slot is free, the next in the chain may run
        except Exception as error:
            # tried again: exit record and outputs are still there
            self._back_off(claim, "finalize_failed", error)
        else:
            await self._engine.discard(claim.attempt.id)
        finally:
            finalized.set()
            await early  # not cancelled: that could hit it in the middle of its transaction
            self.wake()

    async def _release_early(self, claim: Claim, exit_record: ExitRecord, finalized: asyncio.Event) -> None:
        """Give the accelerators back when finalizing takes its time: nothing of the attempt is left to use them."""
        if not claim.attempt.accelerators or exit_record.unkillable:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(finalized.wait(), LONG_FINALIZING_SECONDS)
        if finalized.is_set():
            return
        with contextlib.suppress(*TRANSIENT):  # the end releases them in any case
            async with self._database.writing() as session:
                now = await database_now(session)
                await leases.end_of_attempt(session, claim.attempt.id, proven_empty=True, now=now)
            self.wake()

    def _back_off(self, claim: Claim, event: str, error: Exception) -> None:
        """Leave an attempt alone for a while, longer after each failure."""
        before = self._backoffs.get(claim.attempt.id)
        failures = before.failures + 1 if before is not None else 1
        seconds = backoff_seconds(failures)
        self._backoffs[claim.attempt.id] = _Backoff(failures=failures, until=self._monotonic() + seconds)
        log_failure(logger, event, error, _ids(claim) | {"next_try_in": seconds})

    async def _project(self) -> None:
        """Keep up with scripts that report through their output; finalizing attempts are projected by the finalizer."""
        if self._monotonic() - self._last_projection < PROJECTION_SECONDS:
            return
        self._last_projection = self._monotonic()
        running = [claim for claim in self._claims.values() if claim.attempt.id not in self._finalizing]
        await self._projections.advance(running)

    async def _refresh(self, claim: Claim) -> None:
        async with self._database.reading() as session:
            job = await store.get(session, claim.job.id)
        self._claims[claim.attempt.id] = Claim(job=job, attempt=claim.attempt)

    def _forget(self, claim: Claim) -> None:
        for known in (self._claims, self._backoffs):
            known.pop(claim.attempt.id, None)
        self._silent.discard(claim.attempt.id)

    # ---- quarantine -------------------------------------------------------------------------------------------------

    async def _look_after_quarantine(self) -> None:
        """Give accelerators back whose attempts ended with processes that could not be killed, once those are gone."""
        if self._monotonic() - self._last_quarantine_look < QUARANTINE_SECONDS:
            return
        self._last_quarantine_look = self._monotonic()
        async with self._database.reading() as session:
            suspects = await leases.quarantined_attempts(session, self._node_id)
        gone = [one for one in suspects if await self._engine.is_empty(one)]
        if gone:
            async with self._database.writing() as session:
                await leases.release_proven(session, gone, now=await database_now(session))
            logger.info("quarantine_lifted", extra={"attempts": gone})

    # ---- waiting ----------------------------------------------------------------------------------------------------

    async def _watch(self, stopping: asyncio.Event) -> None:
        """Observe the attempts, and beat, until the next round is due or there is something to do in one."""
        deadline = self._monotonic() + self._timing.poll_seconds
        while not stopping.is_set() and not self._woken.is_set() and self._monotonic() < deadline:
            if any(self._step(claim) is not Step.WAIT for claim in self._claims.values()):
                await asyncio.sleep(LEAST_PAUSE_SECONDS)
                return
            await self._beat()
            await self._project()
            await self._limits.look(list(self._claims.values()))
            due = min(deadline, self._last_beat + self._timing.beat_seconds)
            if self._claims:
                due = min(due, self._monotonic() + self._timing.watch_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), timeout=max(due - self._monotonic(), 0.0))

    async def _finish_finalizing(self) -> None:
        """Let ends that are nearly written be written; a model that is still being hashed waits for the next worker."""
        if self._finalizing:
            _, late = await asyncio.wait(list(self._finalizing.values()), timeout=STOPPING_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


@dataclass(frozen=True)
class _Backoff:
    failures: int
    until: float


def _ids(claim: Claim) -> dict[str, object]:
    return {"job_id": claim.job.id, "attempt": claim.attempt.number, "kind": claim.job.kind}
