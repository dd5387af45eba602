"""What every training method must keep: a run that was stopped goes on as if nothing had been."""

import json
import shutil
import signal
from pathlib import Path

from tests.presets.stage import Finished, Home


def stop_and_resume(home: Home, script: str, arguments: list[str], *, at: int) -> tuple[Finished, Finished]:
    """Send SIGTERM after step `at` was printed, then run the same again to the end; return both runs."""
    home.events_file.unlink(missing_ok=True)
    process = home.start(script, *arguments)
    assert process.stdout is not None
    seen: list[str] = []
    while not (seen and seen[-1].startswith(f"step {at}/")):
        seen.append(process.stdout.readline())
        assert process.poll() is None or seen[-1], process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate()
    stopped = Finished(process.wait(), "".join(seen) + stdout, stderr, home.events())
    return stopped, home.run(script, *arguments)


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
