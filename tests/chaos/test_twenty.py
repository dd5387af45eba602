"""Worker and all twenty supervisors die at once: every script goes on, is adopted and ends once."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from app.domain.enums import JobStatus
from tests.chaos.evidence import collect
from tests.chaos.stage import JOURNAL, SCRIPT
from tests.chaos.verdict import judge
from tests.waiting import until
from tests.worker.harness import Site, kill, pids_alive

TWENTY = 20


def supervisors(site: Site) -> dict[str, int]:
    """Return the living supervisor of each attempt."""
    found = {}
    for file in site.node_home().attempts.glob("*/state.json"):
        with contextlib.suppress(FileNotFoundError):  # the attempt has ended since
            pid = json.loads(file.read_bytes())["supervisor_pid"]
            if pids_alive([pid]):
                found[file.parent.name] = pid
    return found


async def test_twenty_scripts_are_adopted(site: Site, record_property: Callable[[str, object], None]) -> None:
    jobs = [await site.submit(SCRIPT, parameters={"ticks": 1, "gate": "go"}) for _ in range(TWENTY)]
    first = site.start_worker(DEEPE_SLOTS=str(TWENTY))
    for job in jobs:
        await site.wait(job, JobStatus.RUNNING)
    # a supervisor that dies before it releases its script leaves nothing to adopt: that is another attempt
    await until(lambda: begun_in(site.root / JOURNAL), "twenty scripts", site.report)
    before = supervisors(site)

    first.kill()
    for pid in before.values():
        kill(pid)
    begun = time.monotonic()
    site.start_worker(DEEPE_SLOTS=str(TWENTY))
    await until(lambda: adopted(site, before), "twenty new supervisors", site.report)
    record_property("seconds_until_twenty_are_adopted", time.monotonic() - begun)
    (site.root / "go").touch()
    rows = await site.wait_for_end(*jobs)

    assert {(row.status, row.attempts) for row in rows} == {(JobStatus.SUCCEEDED, 1)}
    evidence = await collect(site.database, journal=site.root / JOURNAL, acknowledged=jobs)
    assert judge(evidence).violations() == {}, site.report()


async def begun_in(journal: Path) -> bool:
    """Say whether each script has written that it began."""
    return journal.exists() and journal.read_bytes().count(b'"word": "start"') == TWENTY


async def adopted(site: Site, before: dict[str, int]) -> bool:
    """Say whether each attempt has ended or has another supervisor."""
    now = supervisors(site)
    ended = {path.parent.name for path in site.node_home().attempts.glob("*/exit.json")}
    gone = {name for name in before if not Path(site.node_home().attempts / name).exists()}
    return all(name in ended | gone or now.get(name) not in (None, pid) for name, pid in before.items())
