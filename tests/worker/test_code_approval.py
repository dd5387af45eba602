"""Approval of code on a node: checked again at each launch, so that nothing starts once it is withdrawn."""

from datetime import UTC, datetime
from functools import partial

import sqlalchemy as sa

from app.domain.access import Caller, CallerKind, Role
from app.domain.allow_lists import AllowList
from app.domain.code_review import CodeApproval, ReviewState
from app.domain.enums import EndReason, JobStatus
from app.executor.runs.job_code import codes_of_job
from app.registry.methods.code_reviews import CodeReviews
from app.store import code_reviews as store
from app.store.allow_lists import set_of_environment
from tests.waiting import until
from tests.worker.harness import TRAIN, Site

GRACE = Caller(CallerKind.KEY, Role.DEVELOPER, "grace", key_id="2")
NOT_APPROVED = EndReason.CODE_NOT_APPROVED
GATED = "import play\nplay.journal('run')\nplay.wait_for('end')\nplay.adapter()\n"


async def require(site: Site) -> None:
    async with site.database.writing() as session:
        await store.set_policy(session, CodeApproval.REQUIRED, now=datetime.now(UTC))


async def approved(site: Site, job_id: str) -> str:
    """Approve the code of a job; return its digest."""
    codes = codes_of_job(await site.row(job_id))
    reviews = CodeReviews(site.files)
    async with site.database.writing() as session:
        await reviews.authors(session, codes, None, write=True)
        for code in codes.values():
            await reviews.approve(session, code.digest, by=GRACE, note="")
    return codes["training"].digest


async def withdraw(site: Site, digest: str) -> None:
    async with site.database.writing() as session:
        await CodeReviews(site.files).withdraw(session, digest, by=GRACE, note="")


class TestLaunch:
    async def test_starts_approved_code_only(self, site: Site) -> None:
        await require(site)
        good = await site.submit(TRAIN)
        digest = await approved(site, good)
        unknown = await site.submit(TRAIN + "# other\n")
        named = await site.submit(TRAIN, parameters={"reward_file": "/elsewhere/reward.py"})
        await approved(site, named)
        site.start_worker(DEEPE_SLOTS="3")

        done, refused, not_pinned = await site.wait_for_end(good, unknown, named)

        assert done.status is JobStatus.SUCCEEDED
        assert (refused.status, refused.reason) == (JobStatus.FAILED, NOT_APPROVED)
        waits = codes_of_job(refused)["training"]
        assert refused.reason_params == {"code": f"training {waits.file} {waits.digest}"}
        assert (not_pinned.reason, not_pinned.reason_params) == (NOT_APPROVED, {"code": "reward_file"})
        assert site.journal(unknown) == site.journal(named) == []
        async with site.database.reading() as session:
            states = await store.states(session, {digest, waits.digest})
        assert states == {digest: ReviewState.APPROVED, waits.digest: ReviewState.WAITING}

    async def test_of_a_queued_job_whose_approval_was_withdrawn_does_not_happen(self, site: Site) -> None:
        await require(site)
        running = await site.submit(GATED, file="same.py")
        queued = await site.job(GATED, file="same.py")
        digest = await approved(site, running)
        await site.insert(queued)
        site.start_worker(DEEPE_SLOTS="1")
        await site.wait_for_journal(running)

        await withdraw(site, digest)
        site.open("end")
        first, second = await site.wait_for_end(running, queued.id)

        assert first.status is JobStatus.SUCCEEDED  # it had started
        assert (second.status, second.reason) == (JobStatus.FAILED, NOT_APPROVED)
        assert site.journal(queued.id) == []

    async def test_that_races_with_a_withdrawal_is_seen_by_it_or_does_not_happen(self, any_site: Site) -> None:
        site, reviews = any_site, CodeReviews(any_site.files)
        await require(site)
        site.start_worker(DEEPE_SLOTS="4")
        for number in range(6):
            job = await site.job(GATED, file=f"race{number}.py")
            codes = codes_of_job(job)
            digest = codes["training"].digest
            async with site.database.writing() as session:
                await reviews.authors(session, codes, None, write=True)
                await reviews.approve(session, digest, by=GRACE, note="")
            await site.insert(job)
            if number % 2:
                await site.wait(job.id, JobStatus.LAUNCHING, JobStatus.RUNNING, JobStatus.FAILED)

            async with site.database.writing() as session:
                await reviews.withdraw(session, digest, by=GRACE, note="")
                seen = {row.id for row in await store.started_jobs(session)}
            if job.id in seen:
                site.open("end")
            (row,) = await site.wait_for_end(job.id)

            # one that had not been taken would hang at its gate
            assert row.status is JobStatus.SUCCEEDED if site.journal(job.id) else row.reason is NOT_APPROVED
            (site.root / "gates" / "end").unlink(missing_ok=True)

    async def test_waits_for_a_decision_that_is_not_committed(self, any_site: Site) -> None:
        """On SQLite the claim itself waits; on Postgres the launch does, with its attempt in the database."""
        site, reviews = any_site, CodeReviews(any_site.files)
        await require(site)
        job_id = await site.submit(TRAIN)
        digest = await approved(site, job_id)
        async with site.database.writing() as session:
            await reviews.withdraw(session, digest, by=GRACE, note="")
            site.start_worker()
            if site.database.engine.dialect.name == "postgresql":
                await until(partial(_is_waiting, site), "a launch that waits")

        (row,) = await site.wait_for_end(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, NOT_APPROVED)
        assert site.journal(job_id) == []


async def _is_waiting(site: Site) -> bool:
    """Say whether a statement waits for a lock of another."""
    async with site.database.reading() as session:
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool((await (await session.connection()).execute(waiting)).scalar())


class TestEnvironment:
    async def test_that_a_queued_job_may_not_use_any_more_ends_it(self, site: Site) -> None:
        job_id = await site.submit(TRAIN)
        async with site.database.writing() as session:
            rule = AllowList(projects=("other",))
            await set_of_environment(session, "base", rule, by="admin", now=datetime.now(UTC))
        site.start_worker()

        (row,) = await site.wait_for_end(job_id)

        assert (row.reason, row.reason_params) == (EndReason.ENVIRONMENT_NOT_ALLOWED, {"environment": "base"})
        assert site.journal(job_id) == []
