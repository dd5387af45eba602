"""When running attempts will end, as far as is known: by their time limit, and by the progress that they report.

Others plan by it (`app.domain.placement`), people see it. It costs a look at what was appended to the events of an
attempt since the last one.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from app.domain.kinds import KINDS
from app.domain.retries import Limits
from app.executor.runs.events import ProgressEvent, RunEvents
from app.executor.runs.progress import ProgressEstimator
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home
from app.store.job_attempts import Claim

logger = logging.getLogger(__name__)

WORTH_TELLING = timedelta(seconds=10)


class Forecasts:
    """The expected ends of one node's attempts."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._readers: dict[str, tuple[RunEvents, ProgressEstimator]] = {}

    async def news(self, claims: Sequence[Claim]) -> Mapping[str, datetime | None]:
        """Return attempt → expected end for those whose row says otherwise."""
        running = {claim.attempt.id: claim for claim in claims if KINDS[claim.job.kind].has_forecast}
        self._readers = {key: kept for key, kept in self._readers.items() if key in running}
        if not running:
            return {}
        ends = await asyncio.to_thread(lambda: {key: self._end(claim) for key, claim in running.items()})
        return {key: end for key, end in ends.items() if _is_news(running[key].attempt.expected_end_at, end)}

    def _end(self, claim: Claim) -> datetime | None:
        ends = [end for end in (_by_limit(claim), self._by_progress(claim)) if end is not None]
        return min(ends, default=None)

    def _by_progress(self, claim: Claim) -> datetime | None:
        run = RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
        reader, estimator = self._readers.setdefault(claim.attempt.id, (RunEvents(run), ProgressEstimator()))
        try:
            for event in reader.read():
                if isinstance(event, ProgressEvent):
                    estimator.add(event)
            progress = estimator.progress
            if progress is None or progress.eta_seconds is None:
                return None
            return datetime.fromtimestamp(progress.time + progress.eta_seconds, tz=UTC)
        except (OSError, OverflowError, ValueError) as error:  # a script may report anything
            logger.debug("no_forecast", extra={"job_id": claim.job.id, "error": str(error)})
            return None


def _by_limit(claim: Claim) -> datetime | None:
    seconds = Limits.of(claim.job.limits).seconds
    begun = claim.attempt.started_at or claim.attempt.created_at
    return None if seconds is None else begun + timedelta(seconds=seconds)


def _is_news(before: datetime | None, now: datetime | None) -> bool:
    if before is None or now is None:
        return before is not now
    return abs(now - before) >= WORTH_TELLING
