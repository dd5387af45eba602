"""Keep the events that scripts print into their output up to date while the attempts of a node run."""

import asyncio
from collections.abc import Iterable

from app.domain.enums import JobKind
from app.executor.log_projection import LogProjector
from app.executor.run_folder import RunFolder
from app.store.home import Home
from app.store.jobs import Claim

_ASKING = frozenset({JobKind.INFERENCE_CUSTOMIZED, JobKind.INFERENCE_COMPLETE})


class Projections:
    """One projector per attempt; the node's worker is the only writer of the projected files."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._projectors: dict[str, LogProjector] = {}

    async def advance(self, claims: Iterable[Claim]) -> None:
        """Look at what the running attempts printed since the last time; forget those that are gone."""
        wanted = {claim.attempt.id: claim for claim in claims if claim.job.kind not in _ASKING}
        self._projectors = {key: kept for key, kept in self._projectors.items() if key in wanted}
        for key, claim in wanted.items():
            projector = self._projectors.get(key) or _projector(
                RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
            )
            self._projectors[key] = projector
            await asyncio.to_thread(projector.advance)


def project_whole_log(run: RunFolder) -> None:
    """Project what is left of an ended attempt's output."""
    projector = _projector(run)
    while projector.advance(final=True):
        pass


def _projector(run: RunFolder) -> LogProjector:
    return LogProjector(run.output_log, run.projected_events)
