"""The stream of a job: everything once, in order, from any point on, and the end after the last byte."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import EndReason
from app.domain.projects import DEFAULT_SCOPE
from app.executor.runs.events import EventPosition, Source
from app.executor.runs.stream import InvalidEventId, JobStreams, StreamItem, StreamPosition
from app.store import job_attempts, job_status, jobs
from app.store.home import Home
from app.store.session import Database
from tests.job_rows import FAILURE, START, SUCCESS, Runner, add_job, claim, new_runner
from tests.waiting import until

LONG_LOG = "".join(f"step {number}: größer 模型 \U0001f600\n" for number in range(20_000))


@pytest.fixture
async def runner(database: Database, tmp_path: Path) -> Runner:
    return await new_runner(database, Home(tmp_path / "home"))


def _streams(runner: Runner) -> JobStreams:
    return JobStreams(runner.database, runner.home, database_seconds=0.1)


def _stream(runner: Runner, job_id: str, position: StreamPosition | None = None) -> AsyncGenerator[StreamItem, None]:
    return _streams(runner).follow(job_id, position or StreamPosition())


async def _items(runner: Runner, job_id: str, position: StreamPosition | None = None) -> list[StreamItem]:
    return [item async for item in _stream(runner, job_id, position)]


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

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


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
            await job_status.request_cancel(session, job_id, now=START)

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
            await job_attempts.requeue(session, first, reason=EndReason.SUPERVISOR_LOST, now=START)
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
        reader = Reader(_stream(runner, job_id))
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
        reader = Reader(_stream(runner, job_id))
        await reader.shows("a")

        runner.prints(job_id, "模".encode()[1:])
        await runner.end(won)

        await reader.task
        assert reader.text == "a模"

    async def test_reader_that_leaves_disturbs_nobody(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, "one\n")

        async with aclosing(_stream(runner, job_id)) as items:
            async for item in items:
                if item.name == "log":
                    break
        await runner.end(won, SUCCESS)

        assert _text(await _items(runner, job_id)) == "one\n"
        assert await claim(runner.database, runner.node_id) is None

    async def test_unknown_job_is_not_found(self, runner: Runner) -> None:
        with pytest.raises(jobs.JobNotFound):
            await _items(runner, "no-such-job")


def _tails(job_id: str) -> list[asyncio.Task[None]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == f"tail {job_id}"]


class WatchedDatabase(Database):
    """Remembers the names of the tasks that opened a session for reading."""

    def __init__(self, url: str) -> None:
        super().__init__(url, scope=DEFAULT_SCOPE)
        self.readers: list[str] = []
        self.failures: list[Exception] = []

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        task = asyncio.current_task()
        self.readers.append(task.get_name() if task else "")
        if self.failures:
            raise self.failures.pop()
        async with super().reading() as session:
            yield session


class TestManyReaders:
    READERS = 20

    async def test_one_task_watches_for_all_of_them(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        await runner.start(job_id)
        database = WatchedDatabase(runner.database.url)
        streams = JobStreams(database, runner.home, database_seconds=0.01)
        readers = [Reader(streams.follow(job_id, StreamPosition())) for _ in range(self.READERS)]
        runner.prints(job_id, "all are there\n")
        for reader in readers:
            await reader.shows("all are there\n")

        looks = 3 * self.READERS
        await until(lambda: database.readers[-looks:] == [f"tail {job_id}"] * looks, "one task that looks")

        runner.prints(job_id, "and go on\n")
        for reader in readers:
            await reader.shows("and go on\n")
        for reader in readers:
            await reader.leave()
        await until(lambda: not _tails(job_id), "the end of the tailer")
        await database.close()

    async def test_each_gets_everything_whenever_it_comes(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        streams = _streams(runner)
        readers: list[Reader] = []
        text = ""
        for number in range(self.READERS):
            readers.append(Reader(streams.follow(job_id, StreamPosition())))
            part = f"part {number}: größer 模型 \U0001f600\n" * 50
            text += part
            middle = len(part.encode()) // 2 + number  # in the middle of a character, now and then
            runner.prints(job_id, part.encode()[:middle])
            runner.reports(job_id, {"type": "metrics", "time": 1.0, "step": number, "values": {"loss": 1.0}})
            await until(lambda: bool(readers[number // 2].items), "an earlier reader")  # noqa: B023 (waited for here)
            runner.prints(job_id, part.encode()[middle:])
        await readers[0].shows(text[-10:])
        joined = readers[-1].items[-1].position if readers[-1].items else StreamPosition()
        await runner.end(won)

        for reader in readers:
            await reader.task
        assert {reader.text for reader in readers} == {text}
        for reader in readers:
            steps = [item.data["step"] for item in reader.items if item.name == "metrics"]
            assert steps == list(range(self.READERS))
            assert _names(reader.items)[-2:] == ["state", "end"]
        assert text.endswith(_text(await _items(runner, job_id, joined)))

    async def test_slow_one_misses_nothing_and_holds_up_nobody(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, "begun\n")
        streams = _streams(runner)
        slow = streams.follow(job_id, StreamPosition())
        seen: list[StreamItem] = []
        async for item in slow:
            seen.append(item)
            if item.name == "log":
                break
        quick = Reader(streams.follow(job_id, StreamPosition()))
        runner.prints(job_id, LONG_LOG * 3)
        await quick.shows(LONG_LOG[-20:])
        await runner.end(won)
        await quick.task

        seen += [item async for item in slow]

        assert quick.text == _text(seen) == "begun\n" + LONG_LOG * 3

    async def test_reader_that_is_ahead_waits_for_the_others(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        runner.prints(job_id, "one\n")
        streams = _streams(runner)
        first = Reader(streams.follow(job_id, StreamPosition()))
        await first.shows("one\n")
        here = first.items[-1].position

        ahead = Reader(
            streams.follow(job_id, replace(here, log=here.log + 4, events=EventPosition(metrics=Source.OWN)))
        )
        runner.prints(job_id, "two\nthree\n")
        await first.shows("three\n")
        await runner.end(won)

        await asyncio.gather(first.task, ahead.task)
        assert ahead.text == "three\n"
        assert ahead.items[-1].data == {"status": "succeeded"}

    async def test_goes_on_if_the_watching_breaks_off(self, runner: Runner) -> None:
        job_id = await add_job(runner.database)
        won = await runner.start(job_id)
        database = WatchedDatabase(runner.database.url)
        reader = Reader(JobStreams(database, runner.home, database_seconds=0.01).follow(job_id, StreamPosition()))
        runner.prints(job_id, "one\n")
        await reader.shows("one\n")
        await until(lambda: f"tail {job_id}" in database.readers, "the tailer")

        database.failures = [OSError("away")]
        await until(lambda: not database.failures, "the failure")
        runner.prints(job_id, "two\n")
        await reader.shows("two\n")
        await runner.end(won)

        await reader.task
        assert reader.text == "one\ntwo\n"
        await database.close()


class TestPosition:
    def test_text_form_goes_there_and_back(self) -> None:
        position = StreamPosition(
            transition=7, attempt=2, log=2**40, events=EventPosition(own=3, projected=5, metrics=Source.OWN)
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
