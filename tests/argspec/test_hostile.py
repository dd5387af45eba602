"""Hostile scripts: each is read to an end within the limits, and what is said of it can be shown to anybody."""

import json
from collections.abc import Iterator

import pytest

from app.argspec.client import BoundedReader, Limits
from app.domain.parameters import check_parameters, json_schema
from app.registry.methods.script_reading import script_parameters
from tests.argspec.hostile import SCRIPTS


@pytest.fixture(scope="module")
def reader() -> Iterator[BoundedReader]:
    reader = BoundedReader(Limits(cpu_seconds=0.5, memory_bytes=192 * 1024 * 1024))
    yield reader
    reader.close()


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_read_within_the_limits_and_what_is_said_can_be_shown(reader: BoundedReader, name: str) -> None:
    reading = reader.read(SCRIPTS[name])

    script = script_parameters(reading.arguments)
    schema = json.dumps(json_schema(script), allow_nan=False, ensure_ascii=False).encode()
    checked = check_parameters({"x": "1"}, script)
    assert len(schema) < 4 * 1024 * 1024
    assert len(checked.violations) < 10
    assert script.partly_read or reading.problem is None
    if reading.stopped is not None:
        assert reading.stopped.limit in ("cpu_time", "memory", "output")


@pytest.mark.parametrize(
    "name", ["digits", "powers", "shifts", "repeats", "formats", "doubling", "shared lists", "deep list", "no numbers"]
)
def test_what_cannot_be_evaluated_hides_no_option(reader: BoundedReader, name: str) -> None:
    reading = reader.read(SCRIPTS[name])

    script = script_parameters(reading.arguments)
    assert not script.partly_read
    assert script.parameters
    for parameter in script.parameters:
        assert parameter.default is None
