"""Forty random faults on each database, the same ones every time; `make chaos` runs as many as one likes."""

from pathlib import Path

import pytest

from tests.chaos.fault_injector import Plan, report, run
from tests.conftest import BACKENDS
from tests.fork_server import ForkServer

FAULTS = 40


@pytest.mark.redis
@pytest.mark.parametrize("backend", BACKENDS)
async def test_random_faults_lose_nothing_and_run_nothing_twice(
    backend: str, tmp_path: Path, worker_forks: ForkServer
) -> None:
    outcome = await run(Plan(seed=3, faults=FAULTS, backend=backend), tmp_path / "run", worker_forks)

    assert not outcome.verdict.violations(), report(outcome)
    assert sum(outcome.counts.values()) >= FAULTS
    assert len(outcome.evidence.acknowledged) > 10
