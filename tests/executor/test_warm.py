"""Warm starts, with real processes: what a script sees, what happens to who waits, and what starts cold after all.

That supervision is the same is shown by `test_supervisor.py`, which runs both ways.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.executor.attempts import supervision, supervisor, warm, warm_starts
from app.executor.attempts.supervision import ExitRecord, ExitWhy
from app.executor.attempts.warm_starts import ColdStarts, Recipe, WarmStarts, preload_of, starts
from app.presets.catalogue import helpers_dir
from tests.executor.attempts import Attempt, attempts, wait_until
from tests.executor.warming import make_ready, waiting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm starts are for Linux")

Maker = Callable[[], Attempt]
IS_WARM = "import sys\nprint('warm' if 'colorsys' in sys.modules else 'cold')\n"
SLEEP = "import time\nprint('ready')\ntime.sleep(60)"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    yield from attempts(tmp_path, warm=True)


@pytest.fixture
def attempt(make: Maker) -> Attempt:
    return make()


@pytest.fixture
def imports(tmp_path: Path) -> Path:
    """Return a file of imports that leaves a trace."""
    path = tmp_path / "colours.py"
    path.write_text("import colorsys\n")
    return path


class Both:
    """Runs the same script in both ways."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.script = root / "scripts" / "stage.py"
        self.script.parent.mkdir()

    def run(self, source: str, *, env: dict[str, str] | None = None) -> dict[str, tuple[ExitRecord, str]]:
        self.script.write_text(source)
        found = {}
        for way in ("cold", "warm"):
            with_attempts = attempts(self.root, warm=way == "warm")
            attempt = next(with_attempts)()
            attempt.start(
                "",
                argv=(sys.executable, "-u", str(self.script), "--one=1", "two", "-u"),
                env={"PATH": os.environ["PATH"], **(env or {})},
            )
            record = attempt.wait_for_end()
            found[way] = (record, attempt.output.read_text().replace(attempt.id, "ATTEMPT"))
            log = (attempt.folder / "supervisor.log").read_text() if way == "warm" else ""
            assert log == "", log
            next(with_attempts, None)
        return found


@pytest.fixture
def both(tmp_path: Path) -> Both:
    return Both(tmp_path)


REPORT = """
import atexit, gc, json, os, resource, signal, sys, threading
names = sorted(globals())
descriptors = [os.readlink(f"/proc/self/fd/{n}") for n in range(64) if os.path.lexists(f"/proc/self/fd/{n}")]
import helper
class Pickled: pass
import pickle
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "executable": sys.executable, "path": sys.path,
    "flags": repr(sys.flags), "names": names, "file": __file__, "name": __name__, "spec": __spec__,
    "doc": __doc__, "package": __package__, "loader": [type(__loader__).__name__, __loader__.path],
    "main": sys.modules["__main__"].__dict__ is globals(), "builtins": type(__builtins__).__name__,
    "helper": helper.__file__, "pickled": type(pickle.loads(pickle.dumps(Pickled()))) is Pickled,
    "environ": dict(os.environ), "inherited": os.popen("/usr/bin/env | sort").read(),
    "cwd": os.getcwd(), "stdin": sys.stdin.read(), "umask": os.umask(0o22),
    "streams": [[s.encoding, s.errors, s.write_through, s.line_buffering, s.isatty(), type(s.buffer).__name__,
                 s.fileno(), s.name, s.mode] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "same_file": os.fstat(1)[:2] == os.fstat(2)[:2],
    "append": __import__("fcntl").fcntl(1, 3) & os.O_APPEND != 0,
    "descriptors": descriptors,
    "leads": os.getsid(0) == os.getpgid(0) == os.getpid(), "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "oom": open("/proc/self/oom_score_adj").read(), "threads": threading.active_count(),
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "mask": [str(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "limits": [resource.getrlimit(n) for n in range(15)],
    "hooks": [sys.excepthook is sys.__excepthook__, sys.gettrace(), gc.isenabled(), gc.get_threshold()],
    "seen_by_ps": open("/proc/self/cmdline").read().strip(chr(0)).split(chr(0)),
    "variables_seen_by_ps": sorted(filter(None, open("/proc/self/environ").read().split(chr(0)))),
}, indent=1))
"""


CHAINED = """
def divide():
    return 1 / 0
try:
    divide()
except ZeroDivisionError as error:
    raise RuntimeError("chained") from error
"""


class TestScriptSees:
    def test_the_same_in_both_ways(self, both: Both, tmp_path: Path) -> None:
        for folder in ("own", "helpers"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "helper.py").touch()
        env = {
            "PYTHONPATH": f"{tmp_path / 'own'}:{tmp_path / 'helpers'}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONNOUSERSITE": "1",
            "LANG": "C",
            "CUDA_VISIBLE_DEVICES": "",
            "DEEPE_JOB_ID": "j",
        }

        found = both.run(REPORT, env=env)

        cold, warm = (json.loads(found[way][1]) for way in ("cold", "warm"))
        assert warm == cold
        assert cold["argv"][1:] == ["--one=1", "two", "-u"]
        assert cold["helper"] == str(tmp_path / "own" / "helper.py")

    @pytest.mark.parametrize(
        "source",
        [
            "import sys; sys.exit(7)",
            "import sys; sys.exit('a sentence')",
            "import os; os._exit(3)",
            "import os; os.abort()",
            "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
            CHAINED,
            "import atexit\natexit.register(print, 'at the end')\nraise SystemExit(4)",
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
            "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__, a[2].tb_lineno)\n1 / 0",
            "import logging, sys\nlogging.basicConfig()\nlogging.warning('to stderr')\nsys.stdout.write('no newline')",
            "import warnings\nwarnings.warn('mind this')",
        ],
    )
    def test_ends_the_same_in_both_ways(self, both: Both, source: str) -> None:
        found = both.run(source)

        (cold, cold_output), (warm, warm_output) = found["cold"], found["warm"]
        assert (warm.why, warm.code, warm.signal) == (cold.why, cold.code, cold.signal)
        assert warm_output == cold_output

    def test_interrupt_ends_it_by_its_signal(self, both: Both) -> None:
        found = both.run("raise KeyboardInterrupt")

        assert [found[way][0].signal for way in ("cold", "warm")] == [signal.SIGINT] * 2

    def test_starts_processes_that_import_it_anew(self, both: Both) -> None:
        source = (
            "import multiprocessing\ndef double(x): return 2 * x\n"
            "if __name__ == '__main__':\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(double, [1, 2]))\n"
        )

        found = both.run(source)

        assert [found[way][1] for way in ("cold", "warm")] == ["[2, 4]\n"] * 2

    def test_writes_at_once(self, attempt: Attempt) -> None:
        attempt.start("import sys, time\nsys.stdout.write('no newline')\ntime.sleep(60)")

        wait_until(lambda: attempt.output.exists() and attempt.output.read_text() == "no newline", "the output")

    def test_has_random_numbers_of_its_own(self, make: Maker, tmp_path: Path) -> None:
        imports = tmp_path / "numbers.py"
        imports.write_text("import random")
        drawn = set()
        for _ in range(2):
            attempt = make()
            attempt.start("import random\nprint(random.random(), hash('text'))", preload=imports)
            attempt.wait_for_end()
            drawn |= set(attempt.output.read_text().split())

        assert len(drawn) == 4

    def test_finds_imports_done_and_what_they_set_and_said(self, attempt: Attempt, tmp_path: Path) -> None:
        imports = tmp_path / "talking.py"
        imports.write_text(
            "import colorsys, os, threading, time\nprint('imported')\nos.environ.setdefault('SET', 'by imports')\n"
            "os.environ.setdefault('GIVEN', 'by imports')\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        )

        attempt.start(
            IS_WARM + "import os, threading\nprint(os.environ['SET'], os.environ['GIVEN'], threading.active_count())",
            preload=imports,
            env={"GIVEN": "by the platform"},
        )

        assert attempt.wait_for_end().code == 0
        assert attempt.output.read_text().splitlines() == ["imported", "warm", "by imports by the platform 2"]

    def test_its_forks_carry_its_mark(self, attempt: Attempt) -> None:
        attempt.start(
            "import os, time\n"
            "if os.fork():\n    print('ready')\n    time.sleep(60)\n"
            "os.setsid()\nif os.fork(): os._exit(0)\n"
            "open(JOURNAL, 'w').write(str(os.getpid()))\ntime.sleep(60)"
        )
        attempt.wait_for_line("ready")
        wait_until(lambda: attempt.journal.exists() and attempt.journal.read_text() != "", "the fork")
        fork = int(attempt.journal.read_text())

        marked = supervisor.processes_with(f"DEEPE_ATTEMPT={attempt.id}", candidates={fork})

        assert marked == {fork}
        assert supervision.has_processes(attempt.id)


class TestColdAfterAll:
    @pytest.fixture
    def run(self, attempt: Attempt, imports: Path) -> Callable[..., tuple[ExitRecord, str, str]]:
        def run(source: str, **changes: Any) -> tuple[ExitRecord, str, str]:
            attempt.start(IS_WARM + source, **{"preload": imports, **changes})
            record = attempt.wait_for_end()
            output = attempt.output.read_text() if attempt.output.exists() else ""
            return record, output, (attempt.folder / "supervisor.log").read_text()

        return run

    def test_is_warm_if_nothing_is_in_the_way(self, run: Any) -> None:
        assert run("")[1:] == ("warm\n", "")

    def test_if_the_imports_fail(self, run: Any, imports: Path) -> None:
        imports.write_text("import colorsys, no_such_module")

        record, output, log = run("")

        assert (record.code, output) == (0, "cold\n")
        assert log == "started cold: colours.py: ModuleNotFoundError(\"No module named 'no_such_module'\")\n"

    def test_if_what_they_left_cannot_be_looked_at(self, run: Any, imports: Path) -> None:
        imports.write_text("import colorsys, sys, types\nsys.modules['torch'] = types.ModuleType('torch')")

        record, output, log = run("")

        assert (record.code, output) == (0, "cold\n")
        assert log == "started cold: module 'torch' has no attribute 'cuda'\n"

    @pytest.mark.parametrize("name", ["colorsys.py", "colorsys/__init__.py", "sitecustomize.py"])
    def test_if_the_user_has_a_module_of_the_same_name(self, run: Any, tmp_path: Path, name: str) -> None:
        own = tmp_path / "own" / name
        own.parent.mkdir(parents=True)
        own.touch()

        record, output, log = run(
            "import colorsys\nprint(colorsys.__file__)", env={"PYTHONPATH": str(tmp_path / "own")}
        )

        assert record.code == 0
        assert output.splitlines()[0] == "cold"
        assert "has a module of its own called" in log
        if "colorsys" in name:
            assert output.splitlines()[1] == str(own)

    def test_folder_that_is_no_package_is_no_module(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "own" / "colorsys").mkdir(parents=True)

        assert run("", env={"PYTHONPATH": str(tmp_path / "own")})[1] == "warm\n"

    def test_if_the_script_is_no_python(self, run: Any) -> None:
        record, output, log = run("def")

        assert record.code == 1
        assert output.rstrip().endswith("SyntaxError: invalid syntax")
        assert log.startswith("started cold: SyntaxError")

    def test_if_the_script_is_gone(self, run: Any, tmp_path: Path) -> None:
        record, output, _ = run("", argv=(sys.executable, "-u", str(tmp_path / "gone.py")))

        assert record.code == 2
        assert "gone.py" in output

    def test_says_why_the_output_cannot_be_opened(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()

        record, _, _ = run("", output=tmp_path / "folder")

        assert (record.why, record.error) == (ExitWhy.SPAWN_FAILED, f"{tmp_path / 'folder'}: Is a directory")
        assert record.started_at is None

    def test_if_the_imports_opened_an_accelerator(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(warm, "ACCELERATORS", (str(tmp_path),))
        warm.check([])

        with (tmp_path / "nvidia0").open("w"), pytest.raises(warm.Unfit, match="nvidia0"):
            warm.check([])


class TestWhoWaits:
    def test_ends_with_the_pipe_and_all_it_started(self, attempt: Attempt, imports: Path) -> None:
        imports.write_text("import subprocess\nsubprocess.Popen(['sleep', '60'], start_new_session=True)")
        attempt.prepare("", preload=imports)
        ready = make_ready(attempt.folder)
        wait_until(lambda: len(_family(imports)) == 3, "the imports")
        ours = [psutil.Process(pid) for pid in _family(imports)]

        ready.end()

        wait_until(lambda: not any(process.is_running() for process in ours), "their end")
        assert waiting(imports) == []

    def test_ends_with_the_program_that_keeps_it(self, attempt: Attempt, imports: Path) -> None:
        attempt.prepare("", preload=imports)
        ready = make_ready(attempt.folder)
        interpreter = _idle(imports)
        witness = interpreter.parent()
        assert witness is not None
        keeper = witness.parent()
        assert keeper is not None

        keeper.kill()

        wait_until(lambda: not witness.is_running() and waiting(imports) == [], "their end")
        wait_until(lambda: not keeper.is_running(), "its end")
        assert not ready.take(attempt.folder)

    @pytest.mark.parametrize("who", ["interpreter", "witness"])
    def test_is_replaced_by_a_cold_start_if_it_died(self, attempt: Attempt, imports: Path, who: str) -> None:
        attempt.prepare(IS_WARM + "raise SystemExit(7)", preload=imports)
        ready = make_ready(attempt.folder)
        interpreter = _idle(imports)
        witness = interpreter.parent()
        assert witness is not None

        (interpreter if who == "interpreter" else witness).kill()
        wait_until(lambda: waiting(imports) == [], "its end")

        assert ready.take(attempt.folder)
        assert attempt.wait_for_end().code == 7
        assert attempt.output.read_text() == "cold\n"

    def test_goes_first_when_memory_runs_out(self, attempt: Attempt, imports: Path) -> None:
        attempt.prepare("", preload=imports)
        ready = make_ready(attempt.folder)

        assert Path(f"/proc/{_idle(imports).pid}/oom_score_adj").read_text() == "1000\n"
        ready.end()

    def test_is_no_part_of_an_attempt_beside_it(self, attempt: Attempt, make: Maker, imports: Path) -> None:
        other = make()
        other.prepare("", preload=imports)
        ready = make_ready(other.folder)
        interpreter = _idle(imports)

        attempt.start("import subprocess\nsubprocess.Popen(['sleep', '60'])")
        record = attempt.wait_for_end()

        assert (record.code, record.leftovers, record.unkillable) == (0, 1, 0)
        assert interpreter.is_running()
        ready.end()

    def test_killed_before_the_script_begins_means_that_nothing_ran(self, attempt: Attempt, imports: Path) -> None:
        imports.write_text("import time\ntime.sleep(60)")
        attempt.start("open(JOURNAL, 'a').write('run\\n')", preload=imports)
        wait_until(lambda: attempt.observe().process is not None, "its record")

        attempt.stage().kill()
        record = attempt.wait_for_end()

        assert (record.why, record.code, record.signal, record.started_at) == (ExitWhy.NEVER_STARTED, None, None, None)
        assert attempt.runs() == 0

    def test_stopped_before_the_script_begins(self, attempt: Attempt, imports: Path) -> None:
        imports.write_text("import time\ntime.sleep(60)")
        attempt.start("open(JOURNAL, 'a').write('run\\n')", preload=imports)
        wait_until(lambda: attempt.observe().process is not None, "its record")

        supervision.request_stop(attempt.folder, "cancel")
        record = attempt.wait_for_end()

        assert (record.why, record.stop_reason, record.started_at) == (ExitWhy.STOPPED, "cancel", None)
        assert attempt.runs() == 0

    def test_stop_before_the_start_runs_nothing_and_leaves_nothing(self, attempt: Attempt, imports: Path) -> None:
        attempt.prepare(SLEEP, preload=imports)
        supervision.request_stop(attempt.folder, "cancel")

        assert make_ready(attempt.folder).take(attempt.folder)

        assert attempt.wait_for_end().why is ExitWhy.STOPPED
        wait_until(lambda: waiting(imports) == [], "the interpreter's end")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Iterator[WarmStarts]:
    node = WarmStarts(keep_seconds=600, monotonic=clock)
    yield node
    node.close()


class TestWarmStarts:
    @pytest.fixture
    def run(self, make: Maker, node: WarmStarts, imports: Path) -> Callable[..., str]:
        def run(**changes: Any) -> str:
            """Start an attempt as a node does; return whether that was warm."""
            attempt = make()
            attempt.prepare(IS_WARM, **{"preload": imports, **changes})
            node.start(attempt.folder)
            assert attempt.wait_for_end().code == 0
            return attempt.output.read_text().strip()

        return run

    @pytest.fixture
    def pause(self, clock: Clock, node: WarmStarts) -> Callable[[], None]:
        def pause() -> None:
            clock.now += warm_starts.PAUSE_SECONDS
            node.tend()

        return pause

    def test_the_next_one_of_a_kind_is_warm(self, run: Any, pause: Any) -> None:
        assert run() == "cold"
        pause()
        assert run() == "warm"
        assert run() == "cold"  # it is used once
        pause()
        assert run() == "warm"

    def test_waits_before_it_makes_the_next_one(self, run: Any, node: WarmStarts, imports: Path) -> None:
        run()
        node.tend()

        assert waiting(imports) == []

    def test_what_declares_no_imports_starts_cold_and_makes_nothing_warm(
        self, run: Any, pause: Any, imports: Path
    ) -> None:
        assert run(preload=None) == "cold"
        pause()
        assert run(preload=None) == "cold"
        assert waiting(imports) == []

    def test_fits_only_the_same_variables(self, run: Any, pause: Any) -> None:
        run(env={"OMP_NUM_THREADS": "2"})
        pause()

        assert run(env={"OMP_NUM_THREADS": "1"}) == "cold"
        assert run(env={"OMP_NUM_THREADS": "2"}) == "warm"

    def test_fits_the_next_card_but_not_another_number_of_them(self, run: Any, pause: Any) -> None:
        run(env={"CUDA_VISIBLE_DEVICES": "GPU-a"})
        pause()

        assert run(env={"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}) == "cold"
        assert run(env={"CUDA_VISIBLE_DEVICES": ""}) == "cold"
        assert run(env={"CUDA_VISIBLE_DEVICES": "GPU-b", "DEEPE_JOB_ID": "another"}) == "warm"

    @pytest.mark.parametrize("changed", ["deepe-ready.json", "lib/python3.11/site-packages/new.py", "pyvenv.cfg"])
    def test_does_not_serve_an_environment_that_has_changed(
        self, run: Any, pause: Any, tmp_path: Path, changed: str
    ) -> None:
        prefix = tmp_path / "env"
        (prefix / "lib/python3.11/site-packages").mkdir(parents=True)
        (prefix / "bin").mkdir()
        (prefix / "bin/python").symlink_to(sys.executable)
        script = tmp_path / "stage.py"
        script.write_text(IS_WARM)
        argv = (str(prefix / "bin/python"), "-u", str(script))
        run(argv=argv)
        pause()

        (prefix / changed).write_text("changed")

        assert run(argv=argv) == "cold"

    def test_ends_what_has_waited_long_enough(
        self, run: Any, pause: Any, clock: Clock, node: WarmStarts, imports: Path
    ) -> None:
        run()
        pause()
        _idle(imports)

        clock.now += 601
        node.tend()

        wait_until(lambda: waiting(imports) == [], "its end")
        assert run() == "cold"

    def test_keeps_few(self, run: Any, pause: Any, clock: Clock, imports: Path) -> None:
        for number in range(warm_starts.MOST + 1):
            run(env={"KIND": str(number)})
            pause()

        wait_until(lambda: len(waiting(imports)) == warm_starts.MOST, "the oldest one's end")
        assert run(env={"KIND": "0"}) == "cold"
        assert run(env={"KIND": "1"}) == "warm"

    def test_gives_memory_back_when_it_is_short(
        self, run: Any, pause: Any, node: WarmStarts, imports: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run()
        pause()
        _idle(imports)
        monkeypatch.setattr(warm_starts, "LEAST_FREE_BYTES", 2**60)

        node.tend()

        wait_until(lambda: waiting(imports) == [], "its end")

    def test_leaves_nothing_when_it_is_closed(self, run: Any, pause: Any, node: WarmStarts, imports: Path) -> None:
        run()
        pause()
        _idle(imports)

        node.close()

        wait_until(lambda: waiting(imports) == [], "its end")
        assert run() == "cold"

    def test_is_off_by_default_and_writes_what_it_always_wrote(self, attempt: Attempt) -> None:
        assert isinstance(starts(keep_seconds=0), ColdStarts)
        attempt.warm = False
        attempt.prepare("")

        spec = json.loads((attempt.folder / "spec.json").read_bytes())
        assert sorted(spec) == ["argv", "attempt_id", "cwd", "env", "grace_seconds", "output"]
        assert Recipe.of(attempt.folder) is None


class TestDeclaration:
    @pytest.mark.parametrize("text", ['DEEPE_WARM = "warm_it"', '"""Text."""\n\nDEEPE_WARM = "warm_it"  # why\n'])
    def test_names_one_of_our_helpers(self, tmp_path: Path, text: str) -> None:
        helpers = tmp_path / "helpers"
        helpers.mkdir()
        (tmp_path / "stage.py").write_text(text)
        (tmp_path / "warm_it.py").touch()
        assert preload_of(tmp_path / "stage.py", helpers) is None  # what stands beside the script is not ours

        (helpers / "warm_it.py").touch()
        assert preload_of(tmp_path / "stage.py", helpers) == helpers / "warm_it.py"

    @pytest.mark.parametrize(
        "text",
        ["", "  DEEPE_WARM = 'warm_it'", "DEEPE_WARM = '../warm_it'", "DEEPE_WARM = warm_it", "DEEPE_WARM = 'it'"],
    )
    def test_anything_else_declares_nothing(self, tmp_path: Path, text: str) -> None:
        for name in ("warm_it.py", "it.py"):
            (tmp_path / name).touch()
        (tmp_path / "stage.py").write_text(text)

        assert preload_of(tmp_path / "stage.py", tmp_path) is None

    def test_of_every_shipped_script_that_has_one_is_there(self) -> None:
        named = [
            script for script in (helpers_dir().parent / "scripts").glob("*.py") if b"DEEPE_WARM" in script.read_bytes()
        ]

        assert len(named) >= 7
        assert [script.name for script in named if preload_of(script, helpers_dir()) is None] == []


def _idle(imports: Path) -> psutil.Process:
    """Wait for the interpreter and return it."""
    wait_until(lambda: len(waiting(imports)) == 1, "the interpreter")
    return waiting(imports)[0]


def _family(imports: Path) -> set[int]:
    """Return the interpreter, its witness, and what they started."""
    interpreter = _idle(imports)
    witness = interpreter.parent()
    assert witness is not None
    return {witness.pid, *(child.pid for child in witness.children(recursive=True))}
