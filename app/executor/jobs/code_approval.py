"""Jobs whose code is not approved: refused at submit, named when an approval is withdrawn.

The launch of an attempt checks again (`app.executor.attempts.launch`).
"""

from collections.abc import Awaitable, Callable, Sequence

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.code_review import Code, not_approved
from app.domain.errors import InvalidRequest, Violation
from app.domain.pointers import pointer
from app.executor.runs.job_code import codes_of_job, unpinned_files
from app.executor.runs.job_spec import JobSpec
from app.registry.methods.code_reviews import CodeReviews
from app.registry.methods.record import Method
from app.store import code_reviews as store
from app.store.session import Database
from app.store.tables import JobRow

Record = Callable[[AsyncSession], Awaitable[Method | None]]


class JobCodeApproval:
    """Asks the reviews of code about jobs."""

    def __init__(self, database: Database, reviews: CodeReviews) -> None:
        self._database = database
        self._reviews = reviews

    async def require(
        self, jobs: Sequence[JobRow], method: Method | None, *, at: str, record: Record | None = None
    ) -> None:
        """Raise `InvalidRequest` for jobs whose code is not approved, where that is required; `at` points to them.

        With `record` the code waits for a review from now on; it makes the method version that runs it.
        """
        async with self._database.reading() as session:
            found = await self._refusals(session, jobs, method, at=at, write=False)
        if found and record is not None:
            async with self._database.writing() as session:
                found = await self._refusals(session, jobs, await record(session), at=at, write=True)
        if found:
            raise InvalidRequest(found)

    async def require_still(self, session: AsyncSession, jobs: Sequence[JobRow], method: Method, *, at: str) -> None:
        """Raise `InvalidRequest` for jobs whose code is not approved any more; none changes until the commit."""
        if found := await self._refusals(session, jobs, method, at=at, write=False, lock=True):
            raise InvalidRequest(found)

    async def started_with(self, session: AsyncSession, digest: str) -> Sequence[JobRow]:
        """Return the jobs that run this code now, or are about to."""
        started = await store.started_jobs(session)
        return [job for job in started if any(code.digest == digest for code in codes_of_job(job).values())]

    async def _refusals(
        self,
        session: AsyncSession,
        jobs: Sequence[JobRow],
        method: Method | None,
        *,
        at: str,
        write: bool,
        lock: bool = False,
    ) -> Sequence[Violation]:
        if not await self._reviews.is_required(session):
            return ()
        codes: dict[str, Code] = {}
        found: list[Violation] = []
        for job in jobs:
            codes |= codes_of_job(job)
            for name in unpinned_files(JobSpec.of(job)):
                found.append(Violation(pointer("parameters", name), "code_not_pinned", {"name": name}))
        states = await self._reviews.unapproved(session, codes, lock=lock)
        missing = {stage: codes[stage] for stage in states}
        authors = await self._reviews.authors(session, missing, method, write=write)
        return [
            *found,
            *(not_approved(at, stage, code, states[stage], authors[stage]) for stage, code in missing.items()),
        ]
