"""The stream of a job: everything once, in order, from any point on, and the end after the last byte."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from app.domain.enums import EndReason
from app.executor.runs.events import EventPosition
from app.executor.runs.stream import InvalidEventId, JobStream, StreamItem, StreamPosition
from app.store import jobs
from app.store.home import Home
from app.store.session import Database
from tests.job_rows import FAILURE, START, SUCCESS, Runner, add_job, claim, new_runner
from tests.waiting import until

LONG_LOG = "".join(f"step {number}: größer 模型 \U0001f600\n" for number in range(20_000))


@pytest.fixture
async def runner(database: Database, tmp_path: Path) -> Runner:
    return await new_runner(database, Home(tmp_path / "home"))


def _stream(runner: Runner, job_id: str, position: StreamPosition | None = None) -> JobStream:
    return JobStream(runner.database, runner.home, job_id, position or StreamPosition(), database_seconds=0.1)


async def _items(runner: Runner, job_id: str, position: StreamPosition | None = None) -> list[StreamItem]:
    return [item async for item in _stream(runner, job_id, position).items()]


def _text(items: list[StreamItem]) -> str:
    return "".join(item.data["text"] for item in items if item.name == "log")


def _names(items: list[StreamItem]) -> list[str]:
    return [item.name for item in items]


class Reader:
    """Follows a stream in the background."""

    def __init__(self, items: AsyncIterator[StreamItem]) -> None:
        self.items: list[StreamItem] = []
        self.task = asyncio.create_task(self._read(items))

    async def _read(self, items: AsyncIterator[StreamItem]) -> None:
        async for item in items:
            self.items.append(item)

    @property
    def text(self) -> str:
        return _text(self.items)

    async def shows(self, line: str) -> None:
        await until(lambda: self.text.endswith(line), line)


class TestFinishedJob:
    async def test_says_everything_and_the_end_last(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, "loading\n")
        runner.reports(
            job_id,
            {"type": "metrics", "time": 1.0, "step": 1, "values": {"loss": 2.0}},
            {"type": "progress", "time": 1.0, "step": 1, "total": 4},
            {"type": "evaluation", "time": 2.0, "name": "exact_match", "phase": "after", "value": 0.9, "samples": 10},
            {"type": "note", "time": 3.0, "message": "done soon"},
        )
        await runner.end(won)

        items = await _items(runner, job_id)

        assert _names(items) == [
            *("state", "state", "state"),
            *("metrics", "progress", "evaluation", "note", "log"),
            *("state", "end"),
        ]
        states = [(item.data["status"], item.data["reason"]) for item in items if item.name == "state"]
        assert states == [("queued", None), ("launching", None), ("running", None), ("succeeded", "completed")]
        by_name = {item.name: item.data for item in items}
        assert by_name["metrics"] == {"step": 1, "time": 1.0, "values": {"loss": 2.0}}
        assert by_name["progress"]["percent"] == 25.0
        assert by_name["evaluation"]["value"] == 0.9
        assert by_name["log"] == {"attempt": 1, "text": "loading\n", "offset": 0, "next_offset": 8}
        assert by_name["end"] == {"status": "succeeded"}

    async def test_end_carries_its_reason(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        await runner.run(job_id, FAILURE)

        *_, state, end = await _items(runner, job_id)

        assert (state.name, state.reason) == ("state", EndReason.EXIT_CODE)
        assert end.data == {"status": "failed"}

    async def test_job_that_was_never_launched_ends_too(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        async with runner.database.writing() as session:
            await jobs.request_cancel(session, job_id, now=START)

        items = await _items(runner, job_id)

        assert [item.data.get("status") for item in items] == ["queued", "cancelled", "cancelled"]
        assert items[-1].name == "end"

    async def test_bytes_that_are_no_text_and_a_cut_character_come_at_the_end(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, b"\xff" + "模".encode()[:2])
        await runner.end(won)

        items = await _items(runner, job_id)

        assert _text(items) == "��"
        assert items[-1].position.log == 3

    async def test_output_of_every_attempt_comes_under_its_number(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        first = await runner.start(job_id)
        runner.prints(job_id, "first\n", attempt=1)
        async with runner.database.writing() as session:
            await jobs.requeue(session, first, reason=EndReason.SUPERVISOR_LOST, now=START)
        second = await runner.start(job_id)
        runner.prints(job_id, "second\n", attempt=2)
        await runner.end(second)

        items = await _items(runner, job_id)

        logs = [(item.data["attempt"], item.data["text"]) for item in items if item.name == "log"]
        assert logs == [(1, "first\n"), (2, "second\n")]


class TestResume:
    async def test_from_every_event_no_byte_is_lost_or_doubled(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, LONG_LOG)
        runner.reports(
            job_id, *({"type": "metrics", "time": 1.0, "step": step, "values": {"loss": 1.0}} for step in range(3))
        )
        await runner.end(won)
        whole = await _items(runner, job_id)
        assert _text(whole) == LONG_LOG
        assert _names(whole).count("log") > 2

        for index, item in enumerate(whole[:-1]):
            position = StreamPosition.parse(str(item.position))
            rest = await _items(runner, job_id, position)

            assert _text(whole[: index + 1]) + _text(rest) == LONG_LOG
            assert rest[-1].data == {"status": "succeeded"}
            transitions = [entry.data["status"] for entry in [*whole[: index + 1], *rest] if entry.name == "state"]
            assert transitions == ["queued", "launching", "running", "succeeded"]
            steps = {entry.data["step"] for entry in [*whole[: index + 1], *rest] if entry.name == "metrics"}
            assert steps == {0, 1, 2}

    async def test_behind_the_end_says_the_end_again(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        await runner.run(job_id)
        whole = await _items(runner, job_id)

        again = await _items(runner, job_id, whole[-1].position)

        assert _names(again) == ["end"]


class TestRunningJob:
    async def test_shows_what_comes_while_it_comes(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        reader = Reader(_stream(runner, job_id).items())
        await until(lambda: _names(reader.items) == ["state"], "the first state")

        won = await runner.start(job_id)
        for number in range(5):
            line = f"line {number}\n"
            runner.prints(job_id, line)
            await reader.shows(line)
        runner.prints(job_id, "last words without a newline")
        await runner.end(won)

        await reader.task
        assert reader.text == "".join(f"line {n}\n" for n in range(5)) + "last words without a newline"
        assert [item.data["status"] for item in reader.items[-2:]] == ["succeeded", "succeeded"]
        assert not any(item.name == "end" for item in reader.items[:-1])

    async def test_character_that_is_cut_waits_for_its_rest(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, b"a" + "模".encode()[:1])
        reader = Reader(_stream(runner, job_id).items())
        await reader.shows("a")

        runner.prints(job_id, "模".encode()[1:])
        await runner.end(won)

        await reader.task
        assert reader.text == "a模"

    async def test_reader_that_leaves_disturbs_nobody(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, "one\n")

        async with aclosing(_stream(runner, job_id).items()) as items:
            async for item in items:
                if item.name == "log":
                    break
        await runner.end(won, SUCCESS)

        assert _text(await _items(runner, job_id)) == "one\n"
        assert await claim(runner.database, runner.node_id) is None

    async def test_unknown_job_is_not_found(self, runner: Runner) -> None:
        with pytest.raises(jobs.JobNotFound):
            await _items(runner, "no-such-job")


class TestPosition:
    def test_text_form_goes_there_and_back(self) -> None:
        position = StreamPosition(
            transition=7, attempt=2, log=2**40, events=EventPosition(own=3, projected=5, own_metrics=True)
        )

        assert StreamPosition.parse(str(position)) == position

    @pytest.mark.parametrize("text", [None, ""])
    def test_nothing_is_the_beginning(self, text: str | None) -> None:
        assert StreamPosition.parse(text) == StreamPosition()

    @pytest.mark.parametrize(
        "text",
        [
            "x", "1", "1-2-3", "1-2-3-4", "1-2-3-4.5", "a-0-0-0.0.0", "1--2-0-0.0.0", "-1-0-0-0.0.0", "1-1-0-0.-1.0",
            "99999999999-0-0-0.0.0", "0-99999999999-0-0.0.0", f"0-0-{2**70}-0.0.0", f"0-0-0-{2**70}.0.0", "9" * 5000,
        ],
    )  # fmt: skip
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidEventId) as caught:
            StreamPosition.parse(text)

        assert len(caught.value.params["given"]) <= 80
