"""From the queue to the models: a whole chain, what it leaves behind, and what DeepExtension's backend can read."""

import hashlib
import json
import shutil
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import psutil
import pytest
import redis

from app.domain.enums import EndReason, JobKind, JobStatus, ModelState
from app.executor.attempts.artifacts import read_result
from app.executor.runs.events import MetricsEvent, RunEvents
from app.executor.runs.job_spec import PinnedScript
from app.presets.catalogue import load_manifests, sample_base_models, sample_datasets, script_path
from app.store.tables import JobRow
from tests.servers import RedisServer
from tests.waiting import until
from tests.worker.harness import DEPLOY, ENDED_WELL, SAVE, TRAIN, Site

STAGES = (JobKind.TRAINING, JobKind.SAVING, JobKind.DEPLOYMENT)
WALK = ["queued", "launching", "running", "succeeded"]


async def submit_custom01(site: Site, *, shipped: bool = False) -> list[str]:
    """Insert the chain of the shipped method Custom01; `shipped`: run from the product's folder, as examples are."""
    manifest = next(manifest for manifest in load_manifests() if manifest.name == "Custom01")
    files = {kind: manifest.definition["stages"][kind]["file"] for kind in (JobKind.TRAINING, JobKind.SAVING)}
    files[JobKind.DEPLOYMENT] = manifest.definition["deployment"]["file"]
    folder = sample_base_models()[0].folder
    assert folder is not None
    shutil.copytree(folder, site.home.models / "base", dirs_exist_ok=True)
    sample = next(dataset for dataset in sample_datasets() if dataset.name == "custom01")
    shutil.copy(sample.path, site.home.datasets / "rows.jsonl")
    rows: list[JobRow] = []
    for position, kind in enumerate(STAGES):
        content = script_path(files[kind]).read_bytes()
        if not shipped:
            (site.home.scripts / files[kind]).write_bytes(content)
        row = await site.job("", kind, position=position, name="first")
        pin = PinnedScript(
            file=files[kind], sha256=hashlib.sha256(content).hexdigest(), size=len(content), shipped=shipped
        )
        row.parameters = {"max_steps": 40} if kind is JobKind.TRAINING else {}
        row.launch = site.spec(pin, kind, effective=row.parameters).document()
        if rows:
            row.chain_id, row.blocked_by = rows[0].id, rows[-1].id
        rows.append(row)
    return await site.insert(*rows)


class TestCustom01:
    async def test_chain_makes_three_models_with_lineage(self, any_site: Site) -> None:
        ids = await submit_custom01(any_site)

        any_site.start_worker()
        rows = await any_site.wait_for_end(*ids)

        assert [(row.status, row.reason) for row in rows] == [ENDED_WELL] * 3, any_site.story(rows[-1])
        models = await any_site.models()
        customized, complete, online = (models[job_id] for job_id in ids)
        assert [customized.state, complete.state, online.state] == list(ModelState)
        assert (customized.parent_id, complete.parent_id, online.parent_id) == (None, customized.id, complete.id)
        assert [row.result_model_id for row in rows] == [customized.id, complete.id, online.id]
        day = f"{datetime.now(UTC):%Y%m%d}"
        assert customized.name == f"base_first_{day}_{ids[0][:4]}"
        assert complete.name == f"{customized.name}_s_{ids[1][:4]}"
        assert online.name == f"{complete.name}_d_{ids[2][:4]}_no_quantization"
        assert (customized.dataset_name, customized.dataset_digest) == ("rows", "0" * 64)
        assert customized.parameters["max_steps"] == 40
        (score,) = customized.details["evaluations"]
        assert score["before"] < score["after"]

    async def test_runs_in_order_and_leaves_manifest_card_and_curve(self, site: Site) -> None:
        ids = await submit_custom01(site)

        site.start_worker()
        rows = await site.wait_for_end(*ids)

        events = await site.events(*ids)
        assert events == [(job_id, "queued") for job_id in ids] + [(j, status) for j in ids for status in WALK[1:]]
        for row, following in pairwise(rows):
            assert row.finished_at is not None
            assert following.started_at is not None
            assert row.finished_at <= following.started_at
        models = await site.models()
        for job_id in ids[:2]:
            path = models[job_id].path
            assert path is not None
            folder = site.home.absolute(path)
            manifest = read_result(site.run_folder(job_id).result)
            assert manifest is not None
            assert (manifest.job_id, manifest.attempt, manifest.root) == (job_id, 1, path)
            for file in manifest.files:
                content = (folder / file.path).read_bytes()
                assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.size)
            card = folder / "README.md"
            await until_true(site, card.is_file, "the model card")
            assert models[job_id].name.replace("|", "\\|") in card.read_text()
        steps = [event for event in RunEvents(site.run_folder(ids[0])).read() if isinstance(event, MetricsEvent)]
        assert steps
        await until_true(site, lambda: site.control_folders() == [], "removal of the control folders")


async def until_true(site: Site, condition: Any, what: str) -> None:
    async def look() -> bool:
        return bool(condition())

    await until(look, what, report=site.report)


# `base` has no package for Redis: the script speaks the protocol itself
SAYS_FAILED = """
import json, os, play, socket
words = [b"SET", os.environ["DEEPE_JOB_ID"].encode(), json.dumps({"status": 3, "updateTime": "", "pid": 0}).encode()]
address = os.environ["AI_PY_REDIS_HOST"], int(os.environ["AI_PY_REDIS_START_PORT"])
with socket.create_connection(address) as server:
    server.sendall(b"*3\\r\\n" + b"".join(b"$%d\\r\\n%s\\r\\n" % (len(word), word) for word in words))
    assert server.recv(5) == b"+OK\\r\\n"
print("the learning rate is too high")
play.adapter()
"""


@pytest.mark.redis
class TestStatusKeys:
    """Redis database 0: what DeepExtension's backend looks at."""

    def read(self, server: RedisServer, job_id: str) -> dict[str, Any]:
        with redis.Redis(port=server.port, db=0) as client:
            value = client.get(job_id)
        record: dict[str, Any] = json.loads(value) if isinstance(value, bytes) else {"status": None, "pid": None}
        return record

    async def test_training_is_running_with_the_pid_of_the_script(
        self, redis_site: Site, own_redis: RedisServer
    ) -> None:
        job_id = await redis_site.submit(
            "import play\nplay.journal('run')\nplay.wait_for('go')\nplay.adapter()\n", file="slow.py"
        )

        redis_site.start_worker()
        await redis_site.wait(job_id, JobStatus.RUNNING)
        await redis_site.wait_for_journal(job_id)

        async def look() -> bool:
            return bool(self.read(own_redis, job_id)["pid"])

        await until(look, "a pid", report=redis_site.report)
        record = self.read(own_redis, job_id)
        script = psutil.Process(record["pid"])
        assert record["status"] == 2
        assert datetime.fromisoformat(record["updateTime"]).utcoffset() is not None
        assert "slow.py" in " ".join(script.cmdline())
        redis_site.open("go")
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)
        await until_true(redis_site, lambda: self.read(own_redis, job_id)["status"] == 1, "the final status")
        assert self.read(own_redis, job_id)["pid"] == 0

    async def test_killing_that_pid_ends_tree_and_job(self, redis_site: Site, own_redis: RedisServer) -> None:
        job_id = await redis_site.submit(
            "import play, subprocess\n"
            "child = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
            "play.journal('run')\nplay.wait_for('never')\n"
        )
        redis_site.start_worker()
        await redis_site.wait_for_journal(job_id)
        await until_true(redis_site, lambda: self.read(own_redis, job_id)["pid"], "a pid")

        psutil.Process(self.read(own_redis, job_id)["pid"]).terminate()
        row = await redis_site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SIGNAL)
        # the supervisor itself lives for a moment after it has told of the end
        await until_true(redis_site, lambda: redis_site.processes() == [], "the end of every process")
        await until_true(redis_site, lambda: self.read(own_redis, job_id)["status"] == 3, "the final status")

    async def test_saving_and_deployment_have_no_pid(self, redis_site: Site, own_redis: RedisServer) -> None:
        waiting = "import play\nplay.wait_for('go')\n"
        ids = await redis_site.submit_chain(
            (JobKind.TRAINING, TRAIN), (JobKind.SAVING, waiting + SAVE), (JobKind.DEPLOYMENT, DEPLOY)
        )
        redis_site.start_worker()

        await redis_site.wait(ids[1], JobStatus.RUNNING)
        await until_true(redis_site, lambda: self.read(own_redis, ids[1])["status"], "the status")
        while_running = self.read(own_redis, ids[1])
        redis_site.open("go")
        await redis_site.wait_for_end(*ids)

        assert (while_running["status"], while_running["pid"]) == (2, 0)
        await until_true(
            redis_site,
            lambda: [self.read(own_redis, job_id)["status"] for job_id in ids] == [1, 1, 1],
            "final statuses",
        )

    async def test_script_that_says_failed_and_exits_with_zero_has_failed(
        self, redis_site: Site, own_redis: RedisServer
    ) -> None:
        job_id = await redis_site.submit(SAYS_FAILED)

        redis_site.start_worker()
        row = await redis_site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SCRIPT_REPORTED_FAILURE), redis_site.story(row)
        assert row.reason_params["detail"] == "the learning rate is too high"
        assert self.read(own_redis, job_id)["status"] == 3

    async def test_questions_leave_no_key(self, redis_site: Site, own_redis: RedisServer) -> None:
        answer = 'print(\'{"status": "resp", "text": "yes"}\')\n'
        job_id = await redis_site.submit(answer, JobKind.INFERENCE_COMPLETE)

        worker = redis_site.start_worker()
        await redis_site.wait(job_id, JobStatus.SUCCEEDED)
        worker.stop()

        with redis.Redis(port=own_redis.port, db=0) as client:
            assert client.exists(job_id) == 0
