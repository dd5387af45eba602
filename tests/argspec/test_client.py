"""Scripts that are read in a process of their own: what it finds, and what happens when it meets a limit."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from app.argspec.client import BoundedReader, Limits, Reading
from app.domain.errors import Violation
from app.domain.texts import Language
from app.presets.catalogue import ROOM
from app.registry.methods.files import python_problem
from app.registry.methods.script_reading import script_parameters
from tests.argspec.hostile import SLOW, WIDE, WORDY
from tests.argspec.reading import read_parameters

SCRIPT = b"import argparse, torch\np = argparse.ArgumentParser()\np.add_argument('--x', type=int)\np.parse_args()\n"
SMALL = Limits(cpu_seconds=0.3, memory_bytes=96 * 1024 * 1024, output_bytes=64 * 1024)


@pytest.fixture
def reader() -> Iterator[BoundedReader]:
    reader = BoundedReader(SMALL)
    yield reader
    reader.close()


def codes(reading: Reading) -> list[str]:
    return [remark.code for remark in reading.arguments.unread]


def children() -> set[psutil.Process]:
    """Return the processes that read for this one."""
    return {child for child in psutil.Process().children() if "app.argspec.child" in " ".join(child.cmdline())}


class TestReading:
    def test_finds_what_the_same_code_finds_here(self) -> None:
        reader = BoundedReader()
        sources = [file.read_bytes() for file in ROOM.rglob("*.py") if b"ArgumentParser" in file.read_bytes()]

        readings = [reader.read(source) for source in sources]

        reader.close()
        assert len(sources) > 10
        for source, reading in zip(sources, readings, strict=True):
            assert reading.problem is None
            assert script_parameters(reading.arguments) == read_parameters(source.decode())

    def test_finds_imports_and_syntax(self, reader: BoundedReader) -> None:
        assert reader.read(SCRIPT).imports.modules == ["torch"]
        assert (reader.check(SCRIPT).problem, reader.check(SCRIPT).imports.modules) == (None, ["torch"])
        for reading in (reader.check(b"x = (\n"), reader.read(b"x = (\n")):
            assert reading.problem is not None
            assert (reading.problem.line, codes(reading)) == (1, ["unread_not_python"])

    def test_half_characters_do_not_reach_an_answer(self, reader: BoundedReader) -> None:
        head, tail = b"import argparse\np = argparse.ArgumentParser('\\ud800')\n", b"\np.parse_args()"
        reading = reader.read(head + rb"p.add_argument('--x\ud800', help='\ud800', default='\ud800')" + tail)

        (option,) = reading.arguments.options
        assert (option.names, option.help, option.default) == (["x?"], "?", None)
        assert option.default_source

    def test_the_process_is_kept_and_the_result_remembered(self, reader: BoundedReader) -> None:
        before = children()
        first = reader.read(SCRIPT)
        mine = children() - before
        reader.read(SCRIPT + b"# other")

        assert reader.read(SCRIPT) is first
        assert len(mine) == 1
        assert children() - before == mine

    def test_several_threads_share_a_few_processes(self, reader: BoundedReader) -> None:
        before = children()
        sources = [SCRIPT.replace(b"--x", b"--x%d" % (number % 8)) for number in range(64)]
        with ThreadPoolExecutor(16) as threads:
            readings = list(threads.map(reader.read, sources))

        found = [reading.arguments.options[0].names for reading in readings]
        assert found == [[f"x{number % 8}"] for number in range(64)]
        assert len(children() - before) <= SMALL.processes


class TestLimits:
    @pytest.mark.parametrize(
        ("source", "limit", "amount"),
        [
            pytest.param(SLOW, "cpu_time", "0.3 s", id="cpu_time"),
            pytest.param(
                WIDE,
                "memory",
                "96 MiB",
                id="memory",
                marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS limits no address space"),
            ),
            pytest.param(WORDY, "output", "64 KiB", id="output"),
        ],
    )
    def test_a_script_that_meets_a_limit_is_partly_read_and_the_next_one_is_read(
        self, reader: BoundedReader, source: bytes, limit: str, amount: str
    ) -> None:
        reading = reader.read(source)

        assert reading.stopped is not None
        assert (reading.stopped.limit, reading.stopped.amount) == (limit, amount)
        assert codes(reading) == [f"unread_{limit}"]
        for language in Language:
            (remark,) = script_parameters(reading.arguments).unread
            assert amount in remark.violation().detail(language)
        assert reader.read(source) is reading
        assert len(reader.read(SCRIPT).arguments.options) == 1

    def test_a_process_that_does_not_answer_is_ended_and_the_script_read_again_when_asked_for(self) -> None:
        reader = BoundedReader()
        before = children()
        reader.read(b"")
        (child,) = children() - before
        child.send_signal(signal.SIGSTOP)

        reader.limits = Limits(wall_seconds=0.1)
        reading = reader.read(SCRIPT)
        reader.limits = Limits()

        assert codes(reading) == ["unread_wall_time"]
        assert not child.is_running()
        assert len(reader.read(SCRIPT).arguments.options) == 1
        reader.close()

    def test_a_process_that_ends_at_work_is_replaced(self, reader: BoundedReader) -> None:
        before = children()
        reader.read(b"")
        (child,) = children() - before
        child.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(reader.read, SCRIPT)
            child.kill()

        # either it was noticed before the script was sent, or in the middle of it
        assert codes(reading.result()) in ([], ["unread_crash"])
        assert len(reader.read(SCRIPT).arguments.options) == 1

    def test_an_upload_that_cannot_be_checked_names_the_limit(self, reader: BoundedReader) -> None:
        problem = python_problem(reader.check(WIDE), "train.py", "/file")

        assert problem == Violation("/file", "unchecked_memory", {"file": "train.py", "amount": "96 MiB"})
        for language in Language:
            assert "train.py" in problem.detail(language)
            assert "96 MiB" in problem.detail(language)

    def test_a_process_that_read_much_is_replaced(self, reader: BoundedReader) -> None:
        before = children()
        reader.read(SCRIPT)
        fresh = children() - before
        reader.read(SCRIPT + b"#" * 4 * 1024 * 1024)
        reader.read(SCRIPT + b"# other")

        assert len(fresh) == 1
        assert not fresh & children()

    def test_who_asks_for_the_same_script_waits_for_one_reading_and_others_do_not(self, reader: BoundedReader) -> None:
        before = children()
        reader.read(b"")
        (child,) = children() - before
        child.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(reader.read, SCRIPT) for _ in range(8)]
            while reader.idle:
                threading.Event().wait(0.01)

            assert len(reader.read(SCRIPT + b"# other").arguments.options) == 1
            assert not any(reading.done() for reading in waiting)
            child.send_signal(signal.SIGCONT)

        assert len({id(reading.result()) for reading in waiting}) == 1


class TestProcess:
    def test_it_gets_nothing_of_the_environment(self, reader: BoundedReader, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_API_TOKEN", "secret")
        before = children()
        reader.read(SCRIPT)
        (child,) = children() - before

        assert not [name for name in child.environ() if not name.startswith(("LC_", "LD_", "DYLD_", "__CF"))]

    def test_it_ends_with_its_parent_however_that_ends(self) -> None:
        parent = subprocess.run(
            [sys.executable, "-c", _PARENT],
            stdout=subprocess.PIPE,
            check=False,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

        assert parent.returncode == -signal.SIGKILL
        try:
            child = psutil.Process(int(parent.stdout))
            child.wait()
        except psutil.NoSuchProcess:
            pass

    def test_closing_ends_it(self, reader: BoundedReader) -> None:
        before = children()
        reader.read(SCRIPT)

        reader.close()

        assert not children() - before


_PARENT = """
import os, signal, psutil
from app.argspec.client import shared_reader
shared_reader().read(b"")
(child,) = psutil.Process().children()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
