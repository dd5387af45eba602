"""A real SFT-Demo training under crashes: of everything around it (nothing repeated), and of itself (it resumes).

Each figure is printed: run with `-s` to see them. `RESTARTS` and `KILLS` of the environment ask for more crashes.
"""

import os
import re
import shutil
import signal
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
from app.presets.catalogue import load_manifests
from tests import training_environment
from tests.chaos.postgres import Postgres, own_postgres
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.servers import redis_executable
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.training,
    pytest.mark.redis,
    pytest.mark.postgres,
    pytest.mark.xdist_group("training-resume"),
]

RESTARTS = int(os.environ.get("RESTARTS", "8"))
KILLS = int(os.environ.get("KILLS", "2"))
SAVE_STEPS = 10
STEPS = max(100, 10 * RESTARTS, 2 * SAVE_STEPS * (KILLS + 1))
STEP_LINE = re.compile(rf"^step (\d+)/{STEPS}  ", re.MULTILINE)


@dataclass(frozen=True)
class Laboratory:
    """An installation on Postgres and Redis, and a training that ran there undisturbed."""

    site: Installation
    postgres: Postgres
    undisturbed: Any

    def kill_everything_around(self, job: str) -> None:
        """Kill worker, API, Redis and Postgres in one moment and wait until all are there again.

        Meanwhile the training goes on for some steps, and rests from then on: it must not end before the services
        are back, however long their start takes.
        """
        (stage,) = self.site.stage_pids(job)
        with ThreadPoolExecutor() as pool:
            others = pool.submit(self.site.kill, "worker", "api", "redis")
            self.postgres.kill()
            there = self.at(job)
            wait_until(lambda: self.at(job) >= there + 10, "steps without any service")
            os.kill(stage, signal.SIGSTOP)
            self.postgres.start()
            others.result()
        os.kill(stage, signal.SIGCONT)

    def submit(self, **members: Any) -> str:
        return submit(self.site, **members)

    def attempt(self, job: str) -> int:
        """Return the number of the newest attempt; from the files, so that it never waits for a service."""
        return max([0, *(int(path.name) for path in (self.site.home / "runs" / job).glob("[0-9]*"))])

    def at(self, job: str) -> int:
        """Return the step that the newest attempt has come to."""
        return max([0, *self.steps_of(job, self.attempt(job))])

    def has_gone_on(self, job: str, attempt: int) -> bool:
        return self.attempt(job) > attempt

    def has_come_to(self, job: str, attempt: int, step: int) -> bool:
        return self.attempt(job) == attempt and self.at(job) >= step

    def printed(self, job: str) -> list[int]:
        """Return the steps that all attempts have printed."""
        return [step for number in range(1, self.attempt(job) + 1) for step in self.steps_of(job, number)]

    def steps_of(self, job: str, attempt: int) -> list[int]:
        """Return the steps that an attempt has printed."""
        log = self.site.home / "runs" / job / str(attempt) / "output.log"
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        return [int(number) for number in STEP_LINE.findall(text)]


@pytest.fixture(scope="module")
def laboratory(
    training_python: Path, base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laboratory]:
    environments = {"base": base, "trl": training_python.parents[1]}
    redis = RedisChoice(RedisKind.WHEEL, executable=Path(redis_executable()))
    with own_postgres() as postgres:
        root = tmp_path_factory.mktemp("resume")
        site = Installation(root, environments, forks=worker_forks, redis=redis, database_url=postgres.url)
        try:
            site.start()
            add_inputs(site)
            job = submit(site)
            yield Laboratory(site, postgres, site.succeed(job))
        finally:
            site.close()


def add_inputs(site: Installation) -> None:
    shutil.copytree(training_environment.base_model("tiny-base"), site.home / "models" / "small-base")
    site.post("/base-models", {"name": "small-base", "path": "small-base"})


def submit(site: Installation, **members: Any) -> str:
    (manifest,) = [manifest for manifest in load_manifests() if manifest.name == "SFT-Demo"]
    steps = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_samples": 8}
    parameters = {**manifest.demo.parameters, **steps}
    inputs = {"base_model": "small-base", "dataset": "sft-demo", "parameters": parameters}
    return str(site.submit("SFT-Demo", **inputs, **members)["id"])


class TestCrashesAroundIt:
    def test_restarts_repeat_no_step_and_change_no_bit(self, laboratory: Laboratory) -> None:
        site = laboratory.site
        job = laboratory.submit()
        wait_until(lambda: site.stage_pids(job), "the training's process")
        stage = site.stage_pids(job)
        killed: Counter[str] = Counter()
        begun = time.monotonic()

        while killed.total() < RESTARTS:
            laboratory.kill_everything_around(job)
            killed.update(("worker", "api", "redis", "postgres"))
        seconds, last = time.monotonic() - begun, laboratory.at(job)
        site.wait_until_ready()
        ended = site.succeed(job)

        curve, expected = site.curve(job), site.curve(laboratory.undisturbed["id"])
        repeated = sum(count - 1 for count in Counter(laboratory.printed(job)).values())
        print(
            f"\n{killed.total()} restarts {dict(killed)} in {seconds:.1f} s, the last at step {last} of {STEPS}; "
            f"steps repeated: {repeated}; attempts: {ended['attempts']}; final loss {curve[-1][1]} "
            f"(undisturbed {expected[-1][1]})"
        )
        assert len(stage) == 1
        assert (repeated, ended["attempts"], ended["recoveries"], ended["retries"]) == (0, 1, 0, 0)
        assert [step for step, _ in curve] == list(range(1, STEPS + 1))
        assert curve == expected
        assert ended["metrics"]["loss"] == laboratory.undisturbed["metrics"]["loss"]
        assert weights(site, job) == weights(site, laboratory.undisturbed["id"])


class TestCrashesOfIt:
    def test_killed_training_resumes_and_ends_with_the_same_loss(self, laboratory: Laboratory) -> None:
        site = laboratory.site
        site.wait_until_ready()
        job = laboratory.submit(retry={"max_retries": KILLS, "backoff_seconds": 0, "on": ["signal"]})

        came_to: list[int] = []
        for number in range(1, KILLS + 1):
            # behind a checkpoint that this attempt wrote itself
            wanted = number * 2 * SAVE_STEPS + 3
            wait_until(partial(laboratory.has_come_to, job, number, wanted), f"step {wanted}")
            for pid in site.stage_pids(job):
                os.kill(pid, signal.SIGKILL)
            wait_until(partial(laboratory.has_gone_on, job, number), "the next attempt")
            came_to.append(max(laboratory.steps_of(job, number)))
        ended = site.succeed(job)

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
        # the newest checkpoint, or the one before if the kill met the writing of that
        assert all(came - 2 * SAVE_STEPS <= step <= came for came, step in zip(came_to, resumed, strict=True))
        assert repeated == sum(came - step for came, step in zip(came_to, resumed, strict=True))
        assert curve[STEPS] == pytest.approx(expected[STEPS], abs=0.02)


def weights(site: Installation, job: str) -> bytes:
    return (site.home / "runs" / job / "1" / "output" / "adapter_model.safetensors").read_bytes()
