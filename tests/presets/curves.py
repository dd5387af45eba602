"""What every training method must keep: a run that was stopped goes on as if nothing had been."""

import json
import shutil
from pathlib import Path

from tests.presets.stage import Finished, Home

SHORT = ("--max_samples=160", "--max_steps=16", "--logging_steps=1", "--eval_samples=4")  # several epochs
# The script gets its SIGTERM while it says that the step is done, however busy the machine is.
STOPPING = """
import os, runpy, signal, sys

step, *sys.argv = sys.argv[1:]
write = sys.stdout.write

def write_and_stop(text):
    count = write(text)
    if text.startswith(f"step {step}/"):
        os.kill(os.getpid(), signal.SIGTERM)
    return count

sys.stdout.write = write_and_stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stop(home: Home, script: str, arguments: list[str], *, at: int) -> Finished:
    """Run the script until SIGTERM comes in the moment in which it prints step `at`."""
    (home.scripts / "stopping.py").write_text(STOPPING)
    return home.run("stopping.py", str(at), script, *arguments)


def stop_and_resume(home: Home, script: str, arguments: list[str], *, at: int) -> tuple[Finished, Finished]:
    """Stop the script at step `at`, then run the same again to the end; return both runs."""
    return stop(home, script, arguments, at=at), home.run(script, *arguments)


def run_whole_and_stopped(
    home: Home, script: str, arguments: list[str], *, at: int
) -> tuple[Finished, Finished, Finished]:
    """Run the script undisturbed, with the output in `whole`, then stopped at step `at` and resumed."""
    whole = home.run(script, *arguments, f"--output_dir={home.path / 'whole'}")
    return whole, *stop_and_resume(home, script, arguments, at=at)


def assert_went_on(whole: Finished, stopped: Finished, resumed: Finished, *curves: str) -> None:
    """Equal seeds give equal curves, and the tail after a stop is the one of an undisturbed run."""
    assert (whole.code, stopped.code, resumed.code) == (0, 143, 0), whole.stderr + stopped.stderr + resumed.stderr
    assert any(event["kind"] == "checkpoint" for event in stopped.of_type("artifact"))
    assert any("resumed from checkpoint-" in note["message"] for note in resumed.of_type("note"))
    for name in curves:
        expected, head, tail = whole.curve(name), stopped.curve(name), resumed.curve(name)
        shared = sorted(head.keys() & expected.keys())
        assert len(shared) >= 2
        assert len(tail) >= 4
        assert [head[step] for step in shared] == [expected[step] for step in shared], name
        later = sorted(tail)[2:]  # the first two points after a stop are means of fewer steps than usual
        assert [tail[step] for step in later] == [
            value for step, value in expected.items() if later[0] <= step <= later[-1]
        ], name


def with_own_settings(base: Path, target: Path) -> Path:
    """Return a copy of a base model whose folder asks for penalties, limits and dropout, as real ones do."""
    shutil.copytree(base, target)
    sampling = {"repetition_penalty": 1.5, "top_k": 4, "top_p": 0.7, "min_p": 0.3, "no_repeat_ngram_size": 2}
    for name, more in {"generation_config.json": sampling, "config.json": {"attention_dropout": 0.5}}.items():
        document = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(document | more))
    return target
