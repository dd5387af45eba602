"""A real SFT-Demo training under crashes: of everything around it (nothing repeated), and of itself (it resumes).

Each figure is printed: run with `-s` to see them.
"""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.cli.private_redis import RedisChoice, RedisKind
from app.presets.catalogue import load_manifests, sample_base_models
from tests.chaos.postgres import Postgres, own_postgres
from tests.e2e.installation import Installation, wait_for
from tests.servers import redis_executable

pytestmark = [
    pytest.mark.training,
    pytest.mark.redis,
    pytest.mark.postgres,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("training-resume"),
]

STEPS = 1000
SAVE_STEPS = 20
RESTARTS = 20
KILLS = 5
STEP_LINE = re.compile(rf"^step (\d+)/{STEPS}  ", re.MULTILINE)


@dataclass(frozen=True)
class Laboratory:
    """An installation on Postgres and Redis, and a training that ran there undisturbed."""

    site: Installation
    postgres: Postgres
    undisturbed: Any

    def kill_everything_around(self) -> None:
        """Kill worker, API, Redis and Postgres in one moment and wait until all are there again."""
        with ThreadPoolExecutor() as pool:
            others = pool.submit(self.site.kill, "worker", "api", "redis")
            self.postgres.kill()
            self.postgres.start()
            others.result()

    def submit(self, **members: Any) -> str:
        return submit(self.site, **members)

    def attempt(self, job: str) -> int:
        """Return the number of the newest attempt; from the files, so that it never waits for a service."""
        return max([0, *(int(path.name) for path in (self.site.home / "runs" / job).glob("[0-9]*"))])

    def at(self, job: str) -> int:
        """Return the step that the newest attempt has come to."""
        return max([0, *self._printed(job, self.attempt(job))])

    def has_come_to(self, job: str, attempt: int, step: int) -> bool:
        return self.attempt(job) == attempt and self.at(job) >= step

    def printed(self, job: str) -> list[int]:
        """Return the steps that all attempts have printed."""
        return [step for number in range(1, self.attempt(job) + 1) for step in self._printed(job, number)]

    def _printed(self, job: str, attempt: int) -> list[int]:
        log = self.site.home / "runs" / job / str(attempt) / "output.log"
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        return [int(number) for number in STEP_LINE.findall(text)]


@pytest.fixture(scope="module")
def laboratory(training_python: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    environments = {"base": base, "trl": training_python.parents[1]}
    redis = RedisChoice(RedisKind.WHEEL, executable=Path(redis_executable()))
    with own_postgres() as postgres:
        root = tmp_path_factory.mktemp("resume")
        site = Installation(root, environments, redis=redis, database_url=postgres.url)
        try:
            site.start()
            add_inputs(site, training_python)
            job = submit(site)
            yield Laboratory(site, postgres, site.succeed(job, seconds=150))
        finally:
            site.close()


def add_inputs(site: Installation, python: Path) -> None:
    (program,) = [model.program for model in sample_base_models() if model.name == "tiny-base"]
    assert program is not None
    folder = site.home / "models" / "tiny-base"
    subprocess.run([python, program, "--output", folder], check=True, capture_output=True, timeout=200)
    site.post("/base-models", {"name": "tiny-base", "path": "tiny-base"})
    site.add_dataset("sft-demo", "sft-demo")


def submit(site: Installation, **members: Any) -> str:
    (manifest,) = [manifest for manifest in load_manifests() if manifest.name == "SFT-Demo"]
    parameters = {**manifest.demo.parameters, "max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1}
    inputs = {"base_model": "tiny-base", "dataset": "sft-demo", "parameters": parameters}
    return str(site.submit("SFT-Demo", **inputs, **members)["id"])


class TestCrashesAroundIt:
    def test_twenty_restarts_repeat_no_step_and_change_no_bit(self, laboratory: Laboratory) -> None:
        site = laboratory.site
        job = laboratory.submit()
        wait_for(lambda: site.stage_pids(job), "the training's process", seconds=60)
        stage = site.stage_pids(job)
        killed: Counter[str] = Counter()
        begun = time.monotonic()

        while killed.total() < RESTARTS and site.stage_pids(job):
            laboratory.kill_everything_around()
            killed.update(("worker", "api", "redis", "postgres"))
        seconds, last = time.monotonic() - begun, laboratory.at(job)
        site.wait_until_ready()
        ended = site.succeed(job, seconds=150)

        curve, expected = site.curve(job), site.curve(laboratory.undisturbed["id"])
        repeated = sum(count - 1 for count in Counter(laboratory.printed(job)).values())
        print(
            f"\n{killed.total()} restarts {dict(killed)} in {seconds:.1f} s, the last at step {last} of {STEPS}; "
            f"steps repeated: {repeated}; attempts: {ended['attempts']}; final loss {curve[-1][1]} "
            f"(undisturbed {expected[-1][1]})"
        )
        assert killed.total() == RESTARTS
        assert len(stage) == 1
        assert (repeated, ended["attempts"], ended["recoveries"], ended["retries"]) == (0, 1, 0, 0)
        assert [step for step, _ in curve] == list(range(1, STEPS + 1))
        assert curve == expected
        assert ended["metrics"]["loss"] == laboratory.undisturbed["metrics"]["loss"]
        assert weights(site, job) == weights(site, laboratory.undisturbed["id"])


class TestCrashesOfIt:
    def test_five_kills_of_the_training_resume_and_end_with_the_same_loss(self, laboratory: Laboratory) -> None:
        site = laboratory.site
        site.wait_until_ready()
        job = laboratory.submit(retry={"max_retries": KILLS, "backoff_seconds": 0, "on": ["signal"]})

        for number in range(1, KILLS + 1):
            # behind a checkpoint that this attempt wrote itself
            wanted = number * 2 * SAVE_STEPS + 3
            wait_for(partial(laboratory.has_come_to, job, number, wanted), f"step {wanted}", seconds=90)
            for pid in site.stage_pids(job):
                os.kill(pid, signal.SIGKILL)
        ended = site.succeed(job, seconds=150)

        curve = dict(site.curve(job))
        expected = dict(site.curve(laboratory.undisturbed["id"]))
        resumed = [attempt["resumed_from"]["step"] for attempt in ended["history"] if attempt["resumed_from"]]
        repeated = sum(count - 1 for count in Counter(laboratory.printed(job)).values())
        print(
            f"\n{KILLS} kills of the training, resumed from steps {resumed}; steps repeated: {repeated} of {STEPS}; "
            f"final loss {curve[STEPS]} (undisturbed {expected[STEPS]}); "
            f"largest difference of a step's loss {max(abs(curve[step] - expected[step]) for step in expected)}"
        )
        assert (ended["attempts"], ended["retries"]) == (KILLS + 1, KILLS)
        assert [attempt["reason"] for attempt in ended["history"]] == ["signal"] * KILLS + ["completed"]
        assert len(resumed) == KILLS
        assert resumed == sorted(resumed)
        assert repeated <= KILLS * (SAVE_STEPS + 20)
        assert curve[STEPS] == pytest.approx(expected[STEPS], abs=0.02)


def weights(site: Installation, job: str) -> bytes:
    return (site.home / "runs" / job / "1" / "output" / "adapter_model.safetensors").read_bytes()
