"""Contained stages on a real worker: what a hostile script gets, with containment and without."""

import contextlib
import json
import os
import pwd
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from app.domain.enums import EndReason, JobKind, JobStatus
from app.domain.inventory import Inventory
from app.executor.runs.job_spec import Named
from app.store.nodes import all_nodes
from tests.bubblewrap import bubblewrap
from tests.worker.harness import DEPLOY, ENDED_WELL, SAVE, TRAIN, Site
from tests.worker.test_retries import SOON

HOSTILE = (Path(__file__).parent / "hostile.py").read_text()
ITS_OWN_IF_CONTAINED = {"write the home of the worker's account"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs stages as another account")
SECRET = "no script may read this"


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """Listen on a loopback port, as the API and a private Redis do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def targets(site: Site, folder: Path, port: int, worker: int) -> dict[str, Any]:
    """Lay out what others have, and return what the script is to try."""
    home = site.home
    (home.root / "license.json").write_text(SECRET)
    (home.secrets_key).write_text(SECRET)
    (home.runs / "other" / "1" / "output").mkdir(parents=True)
    (home.runs / "other" / "1" / "output" / "model").write_text(SECRET)
    (home.datasets / "others.jsonl").write_text(SECRET)
    (home.models / "others").mkdir()
    (home.models / "others" / "model").write_text(SECRET)
    (home.scripts / "others.py").write_text("")
    (folder / "file-of-another-account").write_text(SECRET)
    (folder / "account" / "notes").write_text(SECRET)
    database = str(make_url(site.database_url).database)
    return {
        "worker": worker,
        "supervisor": site.supervisor_pids()[0],
        "port": port,
        "read": {
            "the database": database,
            "the licence": str(home.licence),
            "the key of secrets": str(home.secrets_key),
            "the output of another job": str(home.runs / "other" / "1" / "output" / "model"),
            "another data set": str(home.datasets / "others.jsonl"),
            "another base model": str(home.models / "others" / "model"),
            "files of others in /tmp": str(folder / "file-of-another-account"),
            "the control folder of an attempt": str(site.node_home().node_id),
            "passwords of accounts": "/etc/shadow",
        },
        "list": {
            "the runs of others": str(home.runs / "other"),
            "what the worker's account has": str(folder / "account" / "notes"),
        },
        "write": {
            "the database": database,
            "the home": str(home.root / "planted"),
            "another script": str(home.scripts / "others.py"),
            "its data set": str(home.datasets / "rows.jsonl"),
            "its base model": str(home.models / "base" / "planted"),
            "the environment": str(site.node_home().environments / "base" / "planted"),
            "the home of the worker's account": str(folder / "account" / "planted"),
        },
    }


async def report(site: Site, folder: Path, **variables: str) -> Mapping[str, str]:
    """Run the hostile script and return its report."""
    (folder / "account").mkdir(parents=True)
    waiting = await site.submit("import play\nplay.journal('run')\nplay.wait_for('end')\nplay.adapter()\n")
    worker = site.start_worker(DEEPE_SLOTS="2", HOME=str(folder / "account"), **variables)
    await site.wait_for_journal(waiting, "run")
    with listening() as port:
        tried = targets(site, folder, port, worker.process.pid)
        job_id = await site.submit(HOSTILE.replace('json.loads("{}")', f"json.loads({json.dumps(tried)!r})"))
        row = await site.wait(job_id)
    (site.node_home().environments / "base" / "planted").unlink(missing_ok=True)
    site.open("end")
    await site.wait(waiting)
    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    found: dict[str, str] = json.loads((site.run_folder(job_id).output / "report.json").read_text())
    if target := os.environ.get("HOSTILE_REPORT"):  # the table in docs/containment.md
        Path(target).write_text(json.dumps(found))
    return found


async def test_hostile_script_gets_nothing_that_is_not_its_own(site: Site, tmp_path: Path) -> None:
    bubblewrap()

    found = await report(site, tmp_path / "others", DEEPE_CONTAINMENT="bubblewrap", DEEPE_STAGE_NETWORK="none")

    assert {name: got for name, got in found.items() if got and name not in ITS_OWN_IF_CONTAINED} == {}
    assert len(found) > 25
    assert not (tmp_path / "others" / "account" / "planted").exists()


async def test_hostile_script_gets_all_that_without_containment(site: Site, tmp_path: Path) -> None:
    found = await report(site, tmp_path / "others", DEEPE_CONTAINMENT="off")

    for what in ("read the key of secrets", "read another data set", "write the database", "write its base model"):
        assert found[what], what
    assert found["signal to the worker"] == "sent"


async def test_chain_runs_contained_and_the_node_says_so(site: Site) -> None:
    bubblewrap()
    ids = await site.submit_chain((JobKind.TRAINING, TRAIN), (JobKind.SAVING, SAVE), (JobKind.DEPLOYMENT, DEPLOY))

    site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    rows = await site.wait_for_end(*ids)

    assert [(row.status, row.reason) for row in rows] == [ENDED_WELL] * 3, site.story(rows[-1])
    async with site.database.reading() as session:
        (node,) = await all_nodes(session)
    found = Inventory.model_validate(node.inventory).containment
    assert found is not None
    assert (found.mode, found.network, found.reason) == ("bubblewrap", "all", None)


async def test_stage_keeps_what_it_writes_into_its_output_and_leaves_nothing_else(site: Site) -> None:
    bubblewrap()
    text = (
        "import os, play, tempfile\nfrom pathlib import Path\n"
        "for place in ('beside.txt', '../logs/a.jsonl', '../multimodal/new.png', os.path.expanduser('~/x')):\n"
        "    Path(place).write_text('mine')\n"
        "tempfile.NamedTemporaryFile(delete=False).write(b'mine')\n"
        "Path(os.environ['DEEPE_CACHE_DIR'], 'kept').write_text('kept')\n"
        "play.adapter()\n"
    )
    job_id = await site.submit(text)

    site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    row = await site.wait(job_id)

    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    run = site.run_folder(job_id)
    assert (run.cache / "kept").read_text() == "kept"
    assert (run.output / "adapter_model.safetensors").exists()
    left = ("scripts/beside.txt", "logs/a.jsonl", "multimodal/new.png", "x")
    assert [name for name in left if (site.root / name).exists()] == []


async def test_output_folder_that_became_a_link_opens_nothing(site: Site) -> None:
    """A model's folder lies where a script could have put a link: it is not followed out of the job's folder."""
    bubblewrap()
    first = await site.submit(TRAIN)
    worker = site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    await site.wait(first, JobStatus.SUCCEEDED)
    output = site.run_folder(first).output
    output.rename(output.with_name("moved"))
    output.symlink_to(site.home.root)
    (site.home.root / "adapter_config.json").write_text("{}")
    look = (
        "import os, play, sys\nfolder = os.environ.get('DEEPE_MODEL_PATH', '')\n"
        "print('seen', sorted(os.listdir(folder)) if os.path.isdir(folder) else 'nothing', flush=True)\n"
        "play.complete()\n"
        'print(\'{"status": "success"}\')\n'
    )
    model = (await site.models())[first]

    second = await site.submit(look, JobKind.SAVING, model_id=model.id)
    row = await site.wait(second)

    assert "seen nothing" in site.output(second), site.story(row)
    assert worker.process.poll() is None


async def test_data_set_of_a_project_is_read_with_its_pictures(site: Site) -> None:
    bubblewrap()
    folder = site.home.datasets / "with-pictures"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_text("picture")
    (folder / "rows.jsonl").write_text("{}\n")
    text = (
        "import play\nfrom pathlib import Path\n"
        "print('picture', Path('../datasets/with-pictures/images/a.png').read_text(), flush=True)\nplay.adapter()\n"
    )
    data = Named(id="pictures", name="pictures", path="datasets/with-pictures/rows.jsonl", digest="0" * 64)
    job_id = await site.submit(text, spec={"dataset": data})

    site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    row = await site.wait(job_id)

    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    assert "picture picture" in site.output(job_id)


async def test_draft_beside_the_output_folder_is_renamed_into_it(site: Site) -> None:
    bubblewrap()
    text = (
        "import play\ndraft = play.OUT.with_name('.output.part')\ndraft.mkdir()\n"
        "(draft / 'notes').write_text('kept')\n(draft / 'notes').rename(play.OUT / 'notes')\ndraft.rmdir()\n"
        "play.adapter()\n"
    )
    job_id = await site.submit(text)

    site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    row = await site.wait(job_id)

    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    assert (site.run_folder(job_id).output / "notes").read_text() == "kept"


async def test_links_in_the_place_of_what_the_worker_writes_and_reads_lead_nowhere(site: Site) -> None:
    bubblewrap()
    secret = site.home.licence
    secret.write_text(SECRET)
    others = site.home.runs / "other" / "1" / "output"
    others.mkdir(parents=True)
    (others / "config.json").write_text("{}")
    text = (
        "import os, play\nrun = play.OUT.parent\n"
        "for name in ('output.log', 'events.jsonl', 'events-from-log.jsonl', 'params.json'):\n"
        "    try: os.replace(run / name, run / 'moved')\n"
        "    except OSError: print('kept', name, flush=True)\n"
        f"(run / 'result.json.tmp').symlink_to({str(secret)!r})\n"
        f"play.OUT.rmdir()\nplay.OUT.symlink_to({str(others)!r})\n"
    )
    job_id = await site.submit(text)

    site.start_worker(DEEPE_CONTAINMENT="bubblewrap")
    row = await site.wait(job_id)

    assert row.status is JobStatus.FAILED, site.story(row)
    assert site.output(job_id).count("kept") == 4
    assert secret.read_text() == SECRET
    assert not site.run_folder(job_id).output.is_symlink()
    assert job_id not in await site.models()


@as_root
async def test_stage_runs_as_another_account(site: Site, tmp_path: Path) -> None:
    bubblewrap()
    account = pwd.getpwnam("nobody")
    text = (
        "import getpass, os, play, shutil\nfrom pathlib import Path\n"
        "print('who', os.geteuid(), os.getegid(), getpass.getuser(), flush=True)\n"
        "Path('beside.txt').write_text('mine')\nPath(os.path.expanduser('~/x')).write_text('mine')\n"
        "Path(os.environ['DEEPE_CACHE_DIR'], 'kept').write_text('kept')\n"
        "for place in ('/etc/shadow', '../license.json', '../deepe.db'):\n"
        "    try:\n        open(place).read(); print('read', place, flush=True)\n"
        "    except OSError: pass\n"
        "play.journal('run')\nplay.wait_for('end')\nplay.adapter()\n"
    )
    (site.home.licence).write_text(SECRET)
    (site.root / "journal").chmod(0o777)
    job_id = await site.submit(text)

    site.start_worker(DEEPE_CONTAINMENT="auto", DEEPE_STAGE_USER="nobody", HOME=str(tmp_path))
    await site.wait_for_journal(job_id, "run")
    (supervisor,) = site.supervisor_pids()
    uids = {process.uids().effective for process in site.processes() if process.pid != supervisor}
    site.open("end")
    row = await site.wait(job_id)

    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    output = site.output(job_id)
    assert f"who {account.pw_uid} {account.pw_gid} nobody" in output
    assert "read " not in output
    assert account.pw_uid in uids
    run = site.run_folder(job_id)
    assert (run.output / "adapter_model.safetensors").stat().st_uid == account.pw_uid
    assert run.path.parent.stat().st_uid == 0
    assert not (site.home.scripts / "beside.txt").exists()


@as_root
async def test_files_of_earlier_attempts_belong_to_the_account_in_the_next_one(site: Site, tmp_path: Path) -> None:
    """A Trainer removes old checkpoints: those that the worker handed on are the stage's to remove."""
    bubblewrap()
    text = (
        "import deepe, os, play, shutil, signal\nbegun = deepe.resume_from()\n"
        "if begun is None:\n"
        "    folder = play.OUT / 'checkpoint-2'\n    folder.mkdir()\n    (folder / 'step').write_text('2')\n"
        "    deepe.checkpoint(folder, 2)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "(begun / 'step').write_text('3')\nshutil.rmtree(begun)\nplay.adapter()\n"
    )
    job_id = await site.submit(text, retry=SOON)

    site.start_worker(DEEPE_STAGE_USER="nobody", DEEPE_CONTAINMENT="auto", HOME=str(tmp_path))
    row = await site.wait(job_id)

    assert row.status is JobStatus.SUCCEEDED, site.story(row)
    assert len(await site.attempts(job_id)) == 2


@pytest.mark.parametrize(
    "variable", [{"DEEPE_CONTAINMENT": "bubblewrap"}, {"DEEPE_STAGE_NETWORK": "none"}, {"DEEPE_STAGE_USER": "nobody"}]
)
async def test_worker_that_cannot_keep_its_promise_does_not_start(site: Site, variable: dict[str, str]) -> None:
    """Here because bubblewrap is not on its PATH."""
    worker = site.start_worker(**{"DEEPE_CONTAINMENT": "auto", "PATH": str(site.root), **variable})

    assert worker.process.wait() == 2
    assert next(iter(variable)) in worker.log


async def test_sandbox_that_cannot_be_made_is_a_typed_end(site: Site) -> None:
    bubblewrap()
    (site.root / "bin").mkdir()
    broken = site.root / "bin" / "bwrap"
    broken.symlink_to(bubblewrap().program)
    worker = site.start_worker(DEEPE_CONTAINMENT="bubblewrap", PATH=f"{broken.parent}:{os.defpath}")
    await site.wait(await site.submit(TRAIN), JobStatus.SUCCEEDED)
    broken.unlink()

    row = await site.wait(await site.submit(TRAIN))

    assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SPAWN_FAILED)
    assert "bwrap" in row.reason_params["detail"]
    assert worker.process.poll() is None
