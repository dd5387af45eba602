"""The API dies around its commit: nobody hears of an acceptance, and the repeated request makes or finds the job."""

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from tests.chaos.cluster import PATIENCE_SECONDS, cluster
from tests.chaos.stage import submission
from tests.chaos.verdict import judge
from tests.conftest import BACKENDS
from tests.fork_server import ForkServer
from tests.waiting import until


@pytest.mark.redis
@pytest.mark.parametrize(("point", "jobs"), [("before-commit", 0), ("committed", 1)])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_job_whose_acceptance_nobody_heard_runs_once(
    backend: str, point: str, jobs: int, tmp_path: Path, worker_forks: ForkServer
) -> None:
    body, key = submission({"ticks": 3}), {"Idempotency-Key": "once"}
    async with cluster(tmp_path / "run", backend=backend, nodes=1, forks=worker_forks) as site:
        site.api.kill()
        site.api.start(DEEPE_FAULT_POINT=point)
        await until(site.api_answers, "the API", site.report)
        async with site.client() as client:
            with pytest.raises(httpx.TransportError):
                await client.post("/jobs", json=body, headers=key)
        assert site.api.process is not None
        assert await asyncio.to_thread(site.api.process.wait) == -signal.SIGKILL
        assert len((await site.evidence()).jobs) == jobs

        site.nodes[0].worker.start()
        site.api.start()
        await until(site.api_answers, "the API", site.report)
        async with site.client() as client:
            again = await client.post("/jobs", json=body, headers=key)
        await site.settle(PATIENCE_SECONDS)
        evidence = await site.evidence()

    assert again.status_code == 201, again.text
    assert [(job.id, job.status) for job in evidence.jobs] == [(again.json()["id"], "succeeded")]
    assert judge(evidence).violations() == {}
