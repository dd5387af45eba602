"""Keep the events that scripts print into their output up to date while the attempts of a node run."""

import asyncio
import logging
from collections.abc import Iterable

from app.domain.kinds import KINDS
from app.executor.attempts.log_projection import LogProjector
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home
from app.store.jobs import Claim

logger = logging.getLogger(__name__)


class Projections:
    """One projector per attempt; the node's worker is the only writer of the projected files."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._projectors: dict[str, LogProjector] = {}

    async def advance(self, claims: Iterable[Claim]) -> None:
        """Look at what the running attempts printed since the last time; forget those that are gone."""
        wanted = {claim.attempt.id: claim for claim in claims if not KINDS[claim.job.kind].answers_request}
        self._projectors = {key: kept for key, kept in self._projectors.items() if key in wanted}
        for key, claim in wanted.items():
            try:
                await asyncio.to_thread(self._advance, key, claim)
            except OSError as error:  # such as a full disk; what is missing is made up for at the end
                logger.warning("projection_failed", extra={"job_id": claim.job.id, "error": str(error)})

    def _advance(self, key: str, claim: Claim) -> None:
        if key not in self._projectors:
            self._projectors[key] = _projector(RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number)))
        self._projectors[key].advance()


def project_whole_log(run: RunFolder) -> None:
    """Project what is left of an ended attempt's output."""
    projector = _projector(run)
    while projector.advance(final=True):
        pass


def _projector(run: RunFolder) -> LogProjector:
    return LogProjector(run.output_log, run.projected_events, run.events)
