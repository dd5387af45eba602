"""Metrics: the same from every process, flat however much is finished; the dashboard names what is exported."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from app.api.application import HttpOptions, new_application
from app.api.guards import AccessPolicy
from app.api.prometheus import Metrics
from app.api.routes import metrics as routes
from app.domain.enums import JobKind
from app.store import job_attempts, job_status, statistics
from app.store.job_attempts import UNCHARGED, Claim
from app.store.session import Database
from app.store.statistics import Totals
from tests.api.foundation import client_of
from tests.job_rows import FAILURE, START, SUCCESS, add_job, add_node, claim

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "deepextension.json"
TOKEN, METRICS_TOKEN = "a-token-for-everything", "a-token-for-metrics"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@asynccontextmanager
async def service(database: Database, *, with_tokens: bool = False, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    access = AccessPolicy(token=TOKEN, metrics_token=METRICS_TOKEN) if with_tokens else AccessPolicy()
    metrics = Metrics(database, **options)
    app = new_application(HttpOptions(version="1", access=access, metrics=metrics.http))
    app.state.metrics = metrics
    app.include_router(routes.router)
    async with client_of(app) as client:
        yield client


async def scrape(database: Database, **options: Any) -> Samples:
    async with service(database, **options) as client:
        return samples((await client.get("/metrics")).text)


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


async def won_by(database: Database, node_id: str, *, after: float = 0) -> Claim:
    won = await claim(database, node_id, now=START + timedelta(seconds=after))
    assert won is not None
    return won


async def end(database: Database, won: Claim, end: job_status.End) -> None:
    async with database.writing() as session:
        assert await job_attempts.finish(session, won, end, now=START + timedelta(seconds=9))


class TestFigures:
    async def test_counts_what_ended_with_its_attempts_and_waiting_times(self, database: Database) -> None:
        node_id = await add_node(database)
        for how in (SUCCESS, FAILURE):
            await add_job(database)
            await end(database, await won_by(database, node_id, after=4), how)
        cancelled = await add_job(database)
        async with database.writing() as session:
            await job_status.request_cancel(session, cancelled, now=START)

        found = await scrape(database)

        assert found[key("deepe_jobs_ended_total", kind="training", status="succeeded", reason="completed")] == 1
        assert found[key("deepe_jobs_ended_total", kind="training", status="cancelled", reason="cancelled")] == 1
        assert found[key("deepe_attempts_ended_total", kind="training", reason="exit_code")] == 1
        assert key("deepe_attempts_ended_total", kind="training", reason="cancelled") not in found
        assert found[key("deepe_job_waiting_seconds_bucket", kind="training", le="1")] == 0
        assert found[key("deepe_job_waiting_seconds_bucket", kind="training", le="5")] == 2
        assert found[key("deepe_job_waiting_seconds_sum", kind="training")] == 8

    async def test_an_attempt_that_is_made_again_is_counted_once_each(self, database: Database) -> None:
        node_id = await add_node(database)
        await add_job(database)
        won = await won_by(database, node_id)
        async with database.writing() as session:
            await job_attempts.requeue(
                session, won, reason=FAILURE.reason, now=START + timedelta(seconds=5), again=UNCHARGED
            )
        await end(database, await won_by(database, node_id, after=6), SUCCESS)

        found = await scrape(database)

        assert found[key("deepe_attempts_ended_total", kind="training", reason="exit_code")] == 1
        assert found[key("deepe_attempts_ended_total", kind="training", reason="completed")] == 1
        assert found[key("deepe_job_waiting_seconds_count", kind="training")] == 1

    async def test_launch_and_end_of_one_instant_are_one_attempt(self, database: Database) -> None:
        node_id = await add_node(database)
        await add_job(database)
        await end(database, await won_by(database, node_id, after=9), SUCCESS)

        found = await scrape(database)

        assert found[key("deepe_attempts_ended_total", kind="training", reason="completed")] == 1

    async def test_every_process_gives_the_same_answer_and_counts_nothing_twice(self, database: Database) -> None:
        node_id = await add_node(database)
        await add_job(database)
        await end(database, await won_by(database, node_id), SUCCESS)
        ended = key("deepe_jobs_ended_total", kind="training", status="succeeded", reason="completed")

        answers = [(await scrape(database))[ended] for _ in range(3)]

        assert answers == [1, 1, 1]

    async def test_transitions_of_the_last_seconds_come_with_the_next_look(self, database: Database) -> None:
        await add_job(database, created_at=datetime.now(UTC))

        async with database.writing() as session:
            more = await statistics.fold(session)
            totals = await statistics.totals(session)

        assert not more
        assert totals == Totals()

    async def test_shows_queue_and_nodes_as_they_are(self, database: Database) -> None:
        await add_node(database, "gpu-1")
        await add_job(database)
        await add_job(database, queue="night")
        await add_job(database, kind=JobKind.SAVING)

        found = await scrape(database)

        assert found[key("deepe_jobs_queued", kind="training", queue="default")] == 1
        assert found[key("deepe_jobs_queued", kind="training", queue="night")] == 1
        assert found[key("deepe_jobs_queued", kind="saving", queue="default")] == 1
        assert found[key("deepe_jobs_oldest_queued_age_seconds", kind="training", queue="night")] > 0
        assert found[key("deepe_node_heartbeat_age_seconds", node="gpu-1")] > 0
        assert found[key("deepe_node_accelerators", node="gpu-1")] == 0

    async def test_a_database_that_is_down_is_a_metric(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(*_: Any) -> None:
            raise OperationalError("SELECT 1", None, Exception("gone"))

        monkeypatch.setattr(statistics, "fold", fail)

        found = await scrape(database)

        assert found[key("deepe_database_up")] == 0
        assert not any(name.startswith("deepe_jobs") for name, _ in found)

    async def test_a_redis_that_is_down_is_a_metric(self, database: Database) -> None:
        async def fail() -> None:
            raise ConnectionRefusedError

        assert (await scrape(database, redis=fail))[key("deepe_redis_up")] == 0
        assert key("deepe_redis_up") not in await scrape(database)


class TestHttp:
    async def test_counts_requests_by_the_template_of_their_route(self, database: Database) -> None:
        async with service(database) as client:
            await client.get("/metrics")
            await client.get("/no/such/thing/1")
            await client.request("BREW", "/no/such/thing/2")
            found = samples((await client.get("/metrics")).text)

        counted = {
            (labels["method"], labels["route"], labels["status"]): value
            for (name, pairs), value in found.items()
            if name == "deepe_http_requests_total" and (labels := dict(pairs))
        }
        assert counted == {("GET", "/metrics", "200"): 1, ("other", "unmatched", "404"): 2}


class TestAccess:
    @pytest.mark.parametrize(
        ("path", "token", "status"),
        [
            ("/metrics", None, 401),
            ("/metrics", "wrong", 401),
            ("/metrics", TOKEN, 200),
            ("/metrics", METRICS_TOKEN, 200),
            ("/api/v1/anything", METRICS_TOKEN, 401),
        ],
    )
    async def test_its_own_token_opens_nothing_else(
        self, database: Database, path: str, token: str | None, status: int
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with service(database, with_tokens=True) as client:
            response = await client.get(path, headers=headers)

        assert response.status_code == status


class TestDashboard:
    async def test_names_only_what_is_exported(self, database: Database) -> None:
        async def answers() -> None: ...

        node_id = await add_node(database)
        await add_job(database)
        await add_job(database)
        await end(database, await won_by(database, node_id), SUCCESS)
        await won_by(database, node_id)
        await add_job(database)
        async with service(database, redis=answers) as client:
            await client.get("/metrics")
            exported = {name for name, _ in samples((await client.get("/metrics")).text)}
        panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
        named = {
            name
            for panel in panels
            for target in panel["targets"]
            for name in re.findall(r"\b(?:deepe|process)_[a-z_]+", target["expr"])
        }

        assert named - exported == set()
        ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("deepe_")}
        shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
        assert {name for name in ours - shown if not name.endswith("_created")} == set()

    def test_is_a_dashboard(self) -> None:
        document = json.loads(DASHBOARD.read_text("utf-8"))
        ids = [panel["id"] for panel in document["panels"]]

        assert len(ids) == len(set(ids))
        assert all(panel["title"] and panel["targets"] for panel in document["panels"])
        assert document["templating"]["list"][0]["type"] == "datasource"
