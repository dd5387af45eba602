"""When attempts are expected to end: by their limit, by their progress, whichever is sooner."""

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.executor.attempts.forecast import Forecasts
from app.store import job_attempts
from app.store.home import Home
from app.store.job_attempts import Claim
from app.store.session import Database
from app.store.tables import AttemptRow
from tests.job_rows import START, Runner, add_job, add_node, claim


@pytest.fixture
async def runner(database: Database, tmp_path: Path) -> Runner:
    return Runner(database=database, home=Home(tmp_path), node_id=await add_node(database))


def step(number: int, *, total: int | None = 10) -> dict[str, Any]:
    """Return a progress event; a step takes a minute."""
    time = (START + timedelta(minutes=number)).timestamp()
    return {"type": "progress", "time": time, "step": number, "total": total}


async def running(runner: Runner, **job: Any) -> Claim:
    await add_job(runner.database, **job)
    won = await claim(runner.database, runner.node_id)
    assert won is not None
    return won


class TestForecasts:
    async def test_nothing_is_known_of_a_script_that_says_nothing(self, runner: Runner) -> None:
        assert await Forecasts(runner.home).news([await running(runner)]) == {}

    async def test_progress_tells_and_only_news_is_told(self, runner: Runner) -> None:
        won, forecasts = await running(runner), Forecasts(runner.home)
        runner.reports(won.job.id, step(1), step(2))

        told = await forecasts.news([won])
        won.attempt.expected_end_at = told[won.attempt.id]
        runner.reports(won.job.id, step(3))

        assert told == {won.attempt.id: START + timedelta(minutes=10)}
        assert await forecasts.news([won]) == {}

    async def test_limit_counts_where_it_comes_first(self, runner: Runner) -> None:
        won = await running(runner, limits={"seconds": 300})
        assert won.attempt.expected_end_at == START + timedelta(seconds=300)
        started = dataclasses.replace(
            won, attempt=won.attempt.model_copy(update={"started_at": START + timedelta(minutes=1)})
        )
        runner.reports(won.job.id, step(1), step(2))

        assert await Forecasts(runner.home).news([started]) == {won.attempt.id: START + timedelta(minutes=6)}

    async def test_nonsense_is_no_forecast(self, runner: Runner) -> None:
        won = await running(runner)
        wild = {"type": "progress", "time": 1e300, "step": 1, "total": 2}
        runner.reports(won.job.id, wild, {**wild, "time": 1.1e300, "step": 2, "total": 3})

        assert await Forecasts(runner.home).news([won]) == {}

    async def test_expected_ends_of_ended_attempts_stay(self, runner: Runner) -> None:
        won = await running(runner)
        async with runner.database.writing() as session:
            await job_attempts.expect_ends(session, {won.attempt.id: START})
        await runner.end(won)

        async with runner.database.writing() as session:
            await job_attempts.expect_ends(session, {won.attempt.id: None})

        async with runner.database.reading() as session:
            assert (await session.get_one(AttemptRow, won.attempt.id)).expected_end_at == START
