"""Jobs of a project on their node: they run among its files, with its secrets."""

import copy
from datetime import UTC, datetime

from app.access.secrets import SecretKeys, Secrets
from app.domain.access import LOCAL
from app.domain.enums import JobStatus
from app.domain.projects import Scope
from app.domain.stage_calls import StageCall
from tests.worker.harness import Site

SCRIPT = """
import os, play
print("folder", os.getcwd(), flush=True)
for name in ("datasets", "images"):
    print("beside", os.path.realpath(f"../{name}"), flush=True)
print("theirs", open("../datasets/notes.txt").read(), flush=True)
print("key", os.environ["KEY"][::-1], flush=True)
play.adapter()
"""


def of_project(site: Site, project: str) -> Site:
    other = copy.copy(site)
    other.home, other.database = site.home.of(project), site.database.of(Scope(project))
    other._method = ""
    other.home.create()
    (other.home.scripts / "play.py").write_text((site.home.scripts / "play.py").read_text())
    (other.home.datasets / "notes.txt").write_text(f"notes of {project}")
    return other


async def put(site: Site, value: str) -> None:
    service = Secrets(SecretKeys(site.home.secrets_key), clock=lambda: datetime.now(UTC))
    async with site.database.writing() as session:
        await service.put(session, "hub", value, by=LOCAL, check=lambda _: None)


class TestProjects:
    async def test_same_script_runs_among_the_files_of_each_project(self, site: Site) -> None:
        """One tree of bytes, one name of a secret, two projects."""
        sites = {name: of_project(site, name) for name in ("default", "bikes")}
        jobs = {}
        for name, one in sites.items():
            await put(one, f"secret of {name}")
            call = StageCall(arguments=("{parameters}",), env={"KEY": "secret://hub"})
            jobs[name] = await one.submit(SCRIPT, file="same.py", spec={"call": call})
        site.start_worker(DEEPE_SLOTS="2")

        for name, one in sites.items():
            (row,) = await one.wait_for_end(jobs[name])
            told = dict(line.split(" ", 1) for line in one.output(row.id).splitlines() if " " in line)
            home = one.home.base.resolve()
            assert row.status is JobStatus.SUCCEEDED, one.story(row)
            assert told["theirs"] == f"notes of {name}"
            assert told["beside"] == str(home / "images")
            assert told["key"] == f"secret of {name}"[::-1]
            assert {model.project_id for model in (await one.models()).values()} == {name}
