"""Keep the events that are found in outputs and files up to date while the attempts of a node run."""

import asyncio
import logging
import time
from collections.abc import Iterable

from app.domain.kinds import KINDS
from app.executor.attempts.log_projection import LogProjector, file_positions
from app.executor.attempts.metric_files import MetricFiles
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home
from app.store.job_attempts import Claim

logger = logging.getLogger(__name__)

_FILES_SECONDS = 5.0  # from one look into the output folder to the next


class Projections:
    """One projection per attempt; the node's worker is the only writer of the projected files."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._projections: dict[str, Projection] = {}

    async def advance(self, claims: Iterable[Claim]) -> None:
        """Look at what the running attempts printed since the last time; forget those that are gone."""
        wanted = {claim.attempt.id: claim for claim in claims if not KINDS[claim.job.kind].answers_request}
        self._projections = {key: kept for key, kept in self._projections.items() if key in wanted}
        for key, claim in wanted.items():
            try:
                await asyncio.to_thread(self._advance, key, claim)
            except OSError as error:  # such as a full disk; what is missing is made up for at the end
                logger.warning("projection_failed", extra={"job_id": claim.job.id, "error": str(error)})

    def _advance(self, key: str, claim: Claim) -> None:
        if key not in self._projections:
            run = RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
            self._projections[key] = Projection(run)
        self._projections[key].advance()


class Projection:
    """Finds the events of one attempt: in its output, and in the files that trainers write beside their model."""

    def __init__(self, run: RunFolder) -> None:
        self._output = LogProjector(run.output_log, run.projected_events, run.events)
        self._files = MetricFiles(run.output, file_positions(run.projected_events))
        self._next_look = 0.0

    def advance(self) -> None:
        """Take what is new."""
        self._output.advance()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _FILES_SECONDS
            self._read_files()

    def finish(self) -> None:
        """Take all that is left of an attempt that has ended."""
        while self._output.advance(final=True):
            pass
        while self._read_files():
            pass

    def _read_files(self) -> bool:
        if "metrics" in self._output.told_by_script():
            return False
        found = False
        for reading in self._files.read(now=time.time()):
            self._output.add(reading)
            found = True
        return found


def project_whole_log(run: RunFolder) -> None:
    """Project what is left of an ended attempt."""
    Projection(run).finish()
