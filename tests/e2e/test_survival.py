"""kill -9 of worker, API and Redis while a training runs: it goes on, its curve has no hole, nothing runs twice."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from app.cli.private_redis import RedisChoice, RedisKind
from tests.e2e.adapted import adapted_custom01
from tests.e2e.conftest import Trained
from tests.e2e.installation import NO_BOUND, Installation
from tests.fork_server import ForkServer
from tests.servers import redis_executable
from tests.waiting import wait_until

STEPS = 1000
PARAMETERS = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 100, "batch_size": 8, "learning_rate": 0.3}
ONCE = ["queued", "launching", "running", "succeeded"]


@pytest.fixture(scope="module")
def site(base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    redis = RedisChoice(RedisKind.WHEEL, executable=Path(redis_executable()))
    site = Installation(tmp_path_factory.mktemp("survival"), {"base": base}, forks=worker_forks, redis=redis)
    try:
        site.start()
        site.add_samples()
        adapt(site)
        yield site
    finally:
        site.close()


def adapt(site: Installation) -> None:
    """Replace the training of Custom01, which everybody may do."""
    tag = site.request("GET", "/methods/Custom01/files/training").headers["ETag"]
    content = adapted_custom01().encode()
    site.call("PUT", "/methods/Custom01/files/training", content=content, headers={"If-Match": tag})


@pytest.mark.redis
@pytest.mark.xdist_group("e2e-survival")
class TestCustom01:
    def test_goes_on_through_every_crash_and_ends_like_an_undisturbed_run(self, site: Installation) -> None:
        undisturbed = site.succeed(site.submit(parameters=PARAMETERS)["id"])
        job, hurry = submit_slow(site)
        witness = Witness(site, job)

        kill_worker(site)
        step = site.wait_for_step(job, witness.step + 10)
        site.kill("api")
        site.wait_until_ready()
        step = site.wait_for_step(job, step + 10)
        site.kill("redis", "worker", "api")
        site.wait_until_ready()
        site.wait_for_step(job, step + 10)
        witness.still_the_same()
        hurry.touch()
        ended = site.succeed(job)

        witness.ran_once()
        curve = site.curve(job)
        assert [at for at, _ in curve] == list(range(1, STEPS + 1))
        assert curve == site.curve(undisturbed["id"])
        assert ended["evaluations"] == undisturbed["evaluations"]
        assert ended["metrics"] == undisturbed["metrics"]

    def test_is_found_again_after_everything_was_off(self, site: Installation) -> None:
        job, hurry = submit_slow(site)
        witness = Witness(site, job)

        site.stop()
        gone_on = witness.output_grows()
        site.start()
        witness.still_the_same()
        hurry.touch()
        site.succeed(job)

        assert gone_on
        witness.ran_once()
        assert [at for at, _ in site.curve(job)] == list(range(1, STEPS + 1))

    def test_is_restored_elsewhere_from_a_backup_taken_while_it_ran(
        self, site: Installation, base: Path, worker_forks: ForkServer, tmp_path: Path
    ) -> None:
        undisturbed = site.succeed(site.submit(parameters=PARAMETERS)["id"])
        job, hurry = submit_slow(site)

        deepe("backup", str(tmp_path / "all.tar.gz"), "--all", "--home", str(site.home))
        elsewhere = Installation(tmp_path, {"base": base}, forks=worker_forks)
        deepe("restore", str(tmp_path / "all.tar.gz"), "--home", str(elsewhere.home))
        hurry.touch()
        try:
            elsewhere.start()
            ended = elsewhere.get(f"/jobs/{job}")
            again = elsewhere.succeed(elsewhere.post(f"/jobs/{job}:retry")["id"])
            curves = [elsewhere.curve(one) for one in (undisturbed["id"], again["id"])]
        finally:
            elsewhere.close()

        assert (ended["status"], ended["reason"]) == ("failed", "installation_restored")
        assert curves == [site.curve(undisturbed["id"])] * 2
        assert site.succeed(job)["evaluations"] == again["evaluations"]


def deepe(*words: str) -> None:
    """Run the command as an operator does."""
    subprocess.run([sys.executable, "-m", "app.cli", *words], check=True, timeout=NO_BOUND)


@pytest.mark.training
@pytest.mark.xdist_group("e2e-training")
class TestSftDemo:
    def test_real_training_survives_and_ends_like_the_undisturbed_one(self, trained: Trained) -> None:
        site = trained.site
        job = trained.submit_demo("SFT-Demo", through="customized")["id"]
        site.wait_for_step(job, 5)
        witness = Witness(site, job)

        (stage,) = witness.pids
        os.kill(stage, signal.SIGSTOP)  # a short training: it must not end before it was looked at
        site.kill("worker", "api")
        witness.still_the_same()
        os.kill(stage, signal.SIGCONT)
        site.wait_until_ready()
        kills = 1
        while kills < 4 and site.stage_pids(job):
            site.kill("worker" if kills % 2 else "api")
            site.wait_until_ready()
            kills += 1
        ended = site.succeed(job)

        print(f"step {witness.step} of 120 at the first of {kills} crashes")
        witness.ran_once()
        assert site.curve(job) == site.curve(trained.training["id"])
        assert ended["evaluations"] == trained.training["evaluations"]
        assert ended["metrics"]["loss"] == trained.training["metrics"]["loss"]


def submit_slow(site: Installation) -> tuple[str, Path]:
    """Submit a training that takes minutes, until the file that is returned appears."""
    hurry = site.root / f"hurry-{uuid4()}"
    job = site.submit(parameters=PARAMETERS | {"pause": 0.1, "hurry": str(hurry)})["id"]
    site.wait_for_step(job, 10)
    return job, hurry


class Witness:
    """Remembers what runs of a job, and says afterwards whether it ran once."""

    def __init__(self, site: Installation, job: str) -> None:
        self.site = site
        self.job = job
        self.step = int(site.get(f"/jobs/{job}")["progress"]["step"])
        self.output = site.home / "runs" / job / "1" / "output.log"
        self.pids = site.stage_pids(job)
        self.folders = self._folders()
        assert len(self.pids) == 1, self.pids
        assert len(self.folders) == 1, self.folders

    def still_the_same(self) -> None:
        """The very process goes on, in the only folder that ever was."""
        assert self.site.stage_pids(self.job) == self.pids
        assert self._folders() == self.folders

    def output_grows(self) -> bool:
        """Wait for more output than there is now."""
        before = self.output.stat().st_size
        return wait_until(lambda: self.output.stat().st_size > before, "more output")

    def ran_once(self) -> None:
        """One attempt, one run folder, each status once, and one first step in the output."""
        with self.site.events(self.job) as events:
            statuses = [event.data["status"] for event in events if event.event == "state"]
        output = self.output.read_text("utf-8")
        assert statuses == ONCE
        assert self.site.get(f"/jobs/{self.job}")["attempts"] == 1
        assert [folder.name for folder in self.output.parent.parent.glob("[0-9]*")] == ["1"]
        assert sum(line.startswith("step 1/") for line in output.splitlines()) == 1
        assert self.site.stage_pids(self.job) == []

    def _folders(self) -> list[str]:
        return sorted(path.parent.name for path in self.site.node_home.glob("attempts/*/started"))


def kill_worker(site: Installation) -> None:
    """Kill the worker and wait until the next one has looked after its jobs."""
    site.kill("worker")
    before = site.get("/nodes")["items"][0]["heartbeat_at"]

    def beats() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return bool(site.get("/nodes")["items"][0]["heartbeat_at"] != before)
        return False

    wait_until(beats, "the heartbeat of the new worker")
