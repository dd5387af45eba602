"""What every training method must keep: a run that was stopped goes on as if nothing had been."""

import json
import shutil
from pathlib import Path

from tests.presets.stage import Finished, Home

SHORT = ("--max_samples=160", "--max_steps=16", "--logging_steps=1", "--eval_samples=4")  # several epochs
# The script gets its signal while it says that the step is done, however busy the machine is.
STOPPING = """
import os, runpy, signal, sys

step, kind, *sys.argv = sys.argv[1:]
write = sys.stdout.write

def write_and_stop(text):
    count = write(text)
    if text.startswith(f"step {step}/"):
        os.kill(os.getpid(), signal.Signals[kind])
    return count

sys.stdout.write = write_and_stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stop(home: Home, script: str, arguments: list[str], *, at: int, kind: str = "SIGTERM") -> Finished:
    """Run the script until the signal comes in the moment in which it prints step `at`."""
    (home.scripts / "stopping.py").write_text(STOPPING)
    return home.run("stopping.py", str(at), kind, script, *arguments)


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


def assert_stops_early_over_a_kill(
    home: Home, script: str, whole: list[str], cut: list[str], *, weights: tuple[Path, Path]
) -> None:
    """Run a training whose held-out loss gets worse; killed past its best step, it ends as an undisturbed one.

    Both are measured every 2 steps, with a patience of 3, and report each step.
    """
    undisturbed = home.run(script, *whole)
    curve = undisturbed.curve("eval_loss")
    best = min(curve, key=lambda step: curve[step])
    killed = stop(home, script, cut, at=max(curve) - 1, kind="SIGKILL")
    resumed = home.run(script, *cut)

    assert (undisturbed.code, killed.code, resumed.code) == (0, -9, 0), undisturbed.stderr + resumed.stderr
    assert max(curve) == best + 6, curve  # three measurements without improvement
    for run in (undisturbed, resumed):
        notes = [note["message"] for note in run.of_type("note")]
        assert any(
            note.startswith(f"ended early at step {best + 6} of ")
            and note.endswith("eval_loss has not improved 3 times")
            for note in notes
        )
        assert f"the weights are those of step {best}, the best: eval_loss {curve[best]:.4g}" in notes
        assert run.score("after", "eval_loss") == curve[best]
    assert resumed.curve("eval_loss") == {max(curve): curve[max(curve)]}
    assert weights[0].read_bytes() == weights[1].read_bytes()


def assert_measured_meanwhile(run: Finished, *steps: int) -> None:
    """The rewards of held-out questions are curves, which begin and end with the scores."""
    for name in ("exact_match", "reward"):
        curve = run.curve(f"eval_{name}")
        assert set(curve) == set(steps)
        assert curve[0] == run.score("before", name)
        assert curve[steps[-1]] == run.score("after", name)


def with_own_settings(base: Path, target: Path) -> Path:
    """Return a copy of a base model whose folder asks for penalties, limits and dropout, as real ones do."""
    shutil.copytree(base, target)
    sampling = {"repetition_penalty": 1.5, "top_k": 4, "top_p": 0.7, "min_p": 0.3, "no_repeat_ngram_size": 2}
    for name, more in {"generation_config.json": sampling, "config.json": {"attention_dropout": 0.5}}.items():
        document = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(document | more))
    return target
