"""Secrets of a job on its node: given to its process, and to be found in nothing that it leaves."""

import base64
import os
from datetime import UTC, datetime
from pathlib import Path

from app.access.secrets import SecretKeys, Secrets
from app.domain.access import LOCAL
from app.domain.enums import EndReason, JobStatus
from app.domain.stage_calls import ConfigFile, StageCall
from app.executor.runs.log_file import read_chunk
from app.executor.runs.observe import RunObserver
from tests.worker.harness import Site

TOKEN = "hf_Zm9vYmFyIGFuZCBtb3Jl"
PASSWORD = 'pass\'word with "quotes"'
SCRIPT = """
import base64, json, os, sys
import play
from deepe import note

own = os.environ["TRACKER_KEY"], os.environ["HF_TOKEN"], json.load(open(os.environ["DEEPE_PARAMS"]))["password"]
given = open(sys.argv[sys.argv.index("--config") + 1]).read().count(own[0]), os.environ["DB_PASSWORD"] == own[2]
assert given == (1, True), given
print("argument", sys.argv[sys.argv.index("--hub_token") + 1], flush=True)
print("in words", *own, flush=True)
print("encoded", base64.b64encode(own[0].encode()).decode(), flush=True)
print("[log_data] " + json.dumps({"code": 1, "msg": own[0]}), flush=True)
note("noted " + own[2])
play.journal("run")
play.wait_for("end")
play.adapter()
print("reversed", own[0][::-1], flush=True)
print("last", own[0], flush=True)
sys.exit(3)
"""


async def put(site: Site, **values: str) -> None:
    service = Secrets(SecretKeys(site.home.secrets_key), clock=lambda: datetime.now(UTC))
    async with site.database.writing() as session:
        for name, value in values.items():
            await service.put(session, name, value, by=LOCAL, check=lambda _: None)


def files_with(root: Path, *values: str) -> set[str]:
    """Return the files below `root` that hold one of the values."""
    found = set()
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            if any(value.encode() in content for value in values):
                found.add(path.name)
    return found


class TestSecrets:
    async def test_reach_the_process_and_stay_out_of_what_it_leaves(self, site: Site) -> None:
        await put(site, hub=TOKEN, db=PASSWORD)
        call = StageCall(
            arguments=("--hub_token", "{param:hub_token}", "--config", "{config}", "{parameters}"),
            config=ConfigFile(name="run.yaml", content={"key": "secret://hub"}),
            env={"TRACKER_KEY": "secret://hub", "DB_PASSWORD": "secret://db"},
        )
        parameters = {"hub_token": "secret://hub", "password": "secret://db"}
        job_id = await site.submit(SCRIPT, spec={"call": call}, parameters=parameters)
        late = await site.submit("import play\n", parameters={"token": "secret://gone"})
        site.start_worker(HF_TOKEN="secret://hub", DEEPE_SLOTS="2")
        await site.wait_for_journal(job_id)
        run = site.run_folder(job_id)

        running = read_chunk(run.output_log).text
        notes = RunObserver(site.home).digest(job_id, 1).notes
        on_disk = files_with(site.root / "nodes", TOKEN, PASSWORD)
        site.open("end")
        row, refused = await site.wait_for_end(job_id, late)

        hidden = "*" * len(TOKEN)
        assert running.startswith(f"argument {hidden}\nin words {hidden} {hidden} ")
        assert base64.b64encode(TOKEN.encode()).decode() not in running
        assert [note for note in notes if note.startswith("noted")] == ["noted " + "*" * (len(PASSWORD) + 2)]
        assert on_disk == set()
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.EXIT_CODE)
        assert row.reason_params["log_tail"][-2:] == ["reversed " + TOKEN[::-1], f"last {hidden}"]
        assert files_with(site.home.runs, TOKEN, PASSWORD) == files_with(site.home.logs, TOKEN) == set()
        assert not run.redactions.exists()
        assert files_with(site.root, TOKEN, PASSWORD) == set()
        assert (refused.status, refused.reason) == (JobStatus.FAILED, EndReason.SECRET_MISSING)
        assert refused.reason_params == {"secrets": "gone"}
