"""Stages that are a group of processes, on a real worker; with torch where it matters (gloo, on CPUs)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.domain.enums import EndReason, JobStatus
from app.domain.launchers import Launcher, LauncherKind, Strategy
from tests.waiting import until
from tests.worker.harness import ENDED_WELL, TRAIN, Site, kill, pids_alive

TORCHRUN = Launcher(kind=LauncherKind.TORCHRUN, processes=2)
ACCELERATE = Launcher(kind=LauncherKind.ACCELERATE, processes=2)
with_torch = [pytest.mark.training]
STARTUP = 100.0  # two processes import torch on a busy machine

GROUP = """
import deepe, json, os, play, sys
import torch
from torch import distributed as group
rank = int(os.environ["RANK"])
group.init_process_group("gloo")
(play.NOTES / f"pid-{rank}").write_text(f"{os.getpid()} {os.getsid(0)}")
group.barrier()
play.journal("ready")
"""
# every process starts from other weights and sees other rows: only what they share makes them equal
LEARN = (
    GROUP
    + """
torch.manual_seed(rank)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 6):
    loss = model(torch.randn(8, 4)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    deepe.metrics(step, loss=loss)
seen = {"weights": model.module.weight.flatten().tolist(), "argv": sys.argv, "threads": os.environ["OMP_NUM_THREADS"]}
(play.NOTES / f"seen-{rank}.json").write_text(json.dumps(seen))
print(f"rank {rank} of {group.get_world_size()} is done", flush=True)
if rank == 0:
    play.adapter()
group.barrier()
group.destroy_process_group()
deepe.end()
"""
)
HANG = GROUP + "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"
FAIL = (
    GROUP
    + """
if rank == 1:
    raise ValueError("this row is bad")
group.barrier()
"""
)


@pytest.fixture
def torch_site(site: Site, training_python: Path) -> Site:
    """Return an installation whose node has the environment `trl`."""
    site.place_base()
    (site.node_home().environments / "trl").symlink_to(training_python.parents[1])
    return site


async def submit(site: Site, script: str, launcher: Launcher, strategy: Strategy | None = None, **row: Any) -> str:
    more = {"environment": "trl", "resources": {"accelerators": 0}, **row}
    return await site.submit(script, spec={"launcher": launcher, "strategy": strategy}, **more)


async def wait_until_ready(site: Site, job_id: str) -> dict[int, int]:
    """Return rank → pid once both processes have met."""

    async def look() -> bool:
        return site.journal(job_id).count("ready") == 2

    await until(look, "two processes that have met", site.report)
    found = {rank: (site.root / "journal" / f"pid-{rank}").read_text().split() for rank in (0, 1)}
    assert all(pid == session for pid, session in found.values()), "each is expected to have a session of its own"
    return {rank: int(pid) for rank, (pid, _) in found.items()}


async def nothing_is_left(site: Site) -> None:
    """Wait for the supervisor itself, which lives for a moment after it has told of the end."""

    async def look() -> bool:
        return site.processes() == []

    await until(look, "the end of every process", report=site.report)


class TestGroup:
    pytestmark = with_torch

    @pytest.mark.parametrize(
        ("launcher", "strategy"),
        [(TORCHRUN, None), (ACCELERATE, None), (Launcher(processes=2), Strategy.FSDP2)],
        ids=["torchrun", "accelerate", "strategy"],
    )
    async def test_learns_as_one_with_an_accelerator_for_each(
        self, torch_site: Site, launcher: Launcher, strategy: Strategy | None
    ) -> None:
        job_id = await submit(torch_site, LEARN, launcher, strategy, resources={})

        torch_site.start_worker(DEEPE_SIMULATED_ACCELERATORS="4")
        row = await torch_site.wait(job_id)

        assert (row.status, row.reason) == ENDED_WELL, torch_site.story(row)
        first, second = (json.loads((torch_site.root / "journal" / f"seen-{rank}.json").read_text()) for rank in (0, 1))
        (attempt,) = await torch_site.attempts(job_id)
        assert len(attempt.accelerators) == 2
        config = torch_site.run_folder(job_id).accelerate_config
        assert config.exists() is (strategy is not None)
        if strategy is not None:
            written = yaml.safe_load(config.read_text())
            assert (written["distributed_type"], written["num_processes"]) == ("FSDP", 2)
        assert first["weights"] == second["weights"]
        assert first["argv"] == second["argv"]
        assert first["argv"][1].startswith("--train_id=")
        events = [json.loads(line) for line in torch_site.run_folder(job_id).events.read_text().splitlines()]
        assert [event["step"] for event in events] == [1, 2, 3, 4, 5]
        lines = torch_site.output(job_id).splitlines()
        assert {"rank 0 of 2 is done", "[rank1]: rank 1 of 2 is done"} <= set(lines)

    async def test_cancel_ends_every_process_and_proves_it(self, torch_site: Site) -> None:
        job_id = await submit(torch_site, HANG, TORCHRUN)
        torch_site.start_worker()
        ranks = await wait_until_ready(torch_site, job_id)

        await torch_site.cancel(job_id)
        row = await torch_site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)
        assert pids_alive([*ranks.values()]) == []
        await nothing_is_left(torch_site)
        (attempt,) = await torch_site.attempts(job_id)
        assert attempt.exit is not None
        assert attempt.exit["unkillable"] == 0

    async def test_end_of_one_process_ends_the_job_with_its_reason(self, torch_site: Site) -> None:
        job_id = await submit(torch_site, HANG, TORCHRUN)
        torch_site.start_worker()
        ranks = await wait_until_ready(torch_site, job_id)

        kill(ranks[1])
        row = await torch_site.wait(job_id)

        assert row.status is JobStatus.FAILED
        assert (row.reason, row.reason_params["signal"]) == (EndReason.SIGNAL, "SIGKILL"), torch_site.story(row)
        assert row.reason_params["detail"] == f"rank 1: Signal 9 (SIGKILL) received by PID {ranks[1]}"
        await nothing_is_left(torch_site)

    async def test_error_of_the_process_that_failed_first_is_shown(self, torch_site: Site) -> None:
        job_id = await submit(torch_site, FAIL, TORCHRUN)

        torch_site.start_worker()
        row = await torch_site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.EXIT_CODE), torch_site.story(row)
        assert row.reason_params["detail"] == "ValueError: this row is bad"


class TestEnvironment:
    @pytest.mark.parametrize(("launcher", "package"), [(TORCHRUN, "torch"), (ACCELERATE, "accelerate")])
    async def test_without_the_launcher_says_what_is_missing(
        self, site: Site, launcher: Launcher, package: str
    ) -> None:
        job_id = await submit(site, TRAIN, launcher, environment="base")

        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.MODULE_MISSING), site.story(row)
        assert row.reason_params["module"] == package

    async def test_of_a_server_beside_the_stage_is_named_to_it_and_files_are_those_of_the_submit(
        self, site: Site
    ) -> None:
        site.place_base()
        (site.node_home().environments / "served").symlink_to(site.node_home().environments / "base")
        script = """
import json, os, pathlib, play, sys
seen = {name: os.environ.get(name) for name in ("DEEPE_SERVER_PYTHON", "WORLD_SIZE")}
(named,) = [one.partition("=")[2] for one in sys.argv if one.startswith("--tools_file=")]
seen["tools"] = pathlib.Path(named).read_text()
(play.NOTES / "seen.json").write_text(json.dumps(seen))
play.adapter()
"""
        pinned = site.files.keep_alone("tools.py", b"a = 1")
        (site.home.scripts / "tools.py").write_text("a = 2")
        more = {"files": {"tools_file": asdict(pinned)}, "effective": {"tools_file": "tools.py"}}
        resources: dict[str, Any] = {"resources": {"accelerators": 2}}
        there, gone = [
            await site.submit(script, spec={"server": {"environment": name}, **more}, **resources)
            for name in ("served", "nowhere")
        ]

        site.start_worker(DEEPE_SIMULATED_ACCELERATORS="2")
        row, failed = await site.wait(there), await site.wait(gone)

        assert (row.status, row.reason) == ENDED_WELL, site.story(row)
        seen = json.loads((site.root / "journal" / "seen.json").read_text())
        assert seen["DEEPE_SERVER_PYTHON"] == str(site.node_home().environments / "served" / "bin" / "python")
        assert seen["WORLD_SIZE"] is None
        assert seen["tools"] == "a = 1"
        assert (failed.status, failed.reason) == (JobStatus.FAILED, EndReason.ENV_MISSING)
        assert failed.reason_params["environment"] == "nowhere"
