import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from app.observability import configure_logging, log_context, request_id

logger = logging.getLogger("app.tests")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    names = (None, "uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "httpcore")
    loggers = [logging.getLogger(name) for name in names]
    before = [(found, found.level, found.propagate, found.handlers[:]) for found in loggers]
    yield
    for found, level, propagate, handlers in before:
        found.setLevel(level)
        found.propagate, found.handlers = propagate, handlers


def configured(**options: Any) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(stream=stream, **options)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class TestJson:
    def test_event_and_fields(self) -> None:
        stream = configured(form="json")

        logger.info("job_claimed", extra={"job_id": "j1", "place": "上海", "path": object})

        (line,) = lines(stream)
        assert (line["event"], line["level"], line["logger"]) == ("job_claimed", "info", "app.tests")
        assert (line["job_id"], line["place"]) == ("j1", "上海")
        assert line["time"].endswith("Z")

    def test_context_is_on_every_record_inside(self) -> None:
        stream = configured(form="json")
        token = request_id.set("r1")

        with log_context(job_id="j1"), log_context(attempt=2):
            logger.info("inside")
        logger.info("outside")
        request_id.reset(token)

        inside, outside = lines(stream)
        assert (inside["job_id"], inside["attempt"], inside["request_id"]) == ("j1", 2, "r1")
        assert "job_id" not in outside

    def test_traceback_stays_on_one_line(self) -> None:
        stream = configured(form="json")

        try:
            raise ValueError("a\nb")
        except ValueError:
            logger.exception("failed")

        (line,) = lines(stream)
        assert "ValueError: a\nb" in line["exception"]

    def test_is_chosen_where_there_is_no_terminal(self) -> None:
        stream = configured()

        logger.info("x")

        assert lines(stream)[0]["event"] == "x"

    def test_uvicorn_goes_the_same_way_but_its_access_log_is_ours(self) -> None:
        stream = configured(form="json")

        logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
        logging.getLogger("uvicorn.access").info("GET / 200")

        assert [line["event"] for line in lines(stream)] == ["Started server process [7]"]


class TestConsole:
    def test_is_one_readable_line(self) -> None:
        stream = configured(form="console")

        logger.warning("disk_low", extra={"free": 3, "text": 'a "b" c', "name_of": "\udcff"})

        assert 'warning disk_low  free=3 text="a \\"b\\" c" name_of=\\xff' in stream.getvalue()
        assert stream.getvalue().count("\n") == 1

    def test_newline_in_a_value_forges_no_line(self) -> None:
        stream = configured(form="console")

        logger.info("x", extra={"path": "/a\n12:00:00 error fake"})

        assert stream.getvalue().count("\n") == 1

    def test_terminal_obeys_nothing_that_comes_from_outside(self) -> None:
        stream = configured(form="console")

        try:
            raise ValueError("\x1b]0;owned\x07")
        except ValueError:
            logger.exception("bell\x07", extra={"path": "/y\x1b[2J\x9b2J", "node\x1b": "\u202eevil"})

        assert set(stream.getvalue()).isdisjoint("\x1b\x07\x9b\u202e")
        assert "path=/y\\x1b[2J" in stream.getvalue()


def test_level_is_kept() -> None:
    stream = configured(level="warning", form="json")

    logger.info("no")
    logger.warning("yes")

    assert [line["event"] for line in lines(stream)] == ["yes"]
