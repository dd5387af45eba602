"""Every way to fail has its reason, and what is pinned is what runs."""

from typing import Any

from app.domain.enums import EndReason, JobKind, JobStatus
from app.executor.runs.job_spec import Named
from tests.api.resources import insert_model
from tests.job_rows import add_method
from tests.worker.harness import SAVE, TRAIN, Site

PAIRED = "import play\nplay.journal('run')\n"
CASES: dict[str, tuple[JobKind, str, EndReason, dict[str, Any]]] = {
    "exit_code": (JobKind.TRAINING, "import sys\nprint('no')\nsys.exit(3)\n", EndReason.EXIT_CODE, {"exit_code": 3}),
    "module_missing": (
        JobKind.TRAINING,
        "import no_such_module\n",
        EndReason.MODULE_MISSING,
        {"module": "no_such_module"},
    ),
    "nothing_made": (JobKind.TRAINING, "print('done')\n", EndReason.OUTPUT_MISSING, {}),
    "only_a_name_in_latin_1": (
        JobKind.TRAINING,
        "import os, play\nopen(os.fsencode(play.OUT) + b'/\\xfc.txt', 'w').close()\n",
        EndReason.OUTPUT_MISSING,
        {},
    ),
    "cut_off": (
        JobKind.TRAINING,
        "import play\nplay.adapter()\nopen(play.OUT / 'adapter_model.safetensors', 'r+b').truncate(40)\n",
        EndReason.OUTPUT_INVALID,
        {},
    ),
    "killed": (
        JobKind.TRAINING,
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        EndReason.SIGNAL,
        {"signal": "SIGSEGV"},
    ),
    "no_result": (JobKind.SAVING, "import play\nplay.complete()\n", EndReason.RESULT_FAILED, {}),
    "unsuccessful": (
        JobKind.SAVING,
        "import play\nplay.complete()\nprint('unsuccessful')\n",
        EndReason.RESULT_FAILED,
        {},
    ),
    "deployment_says_so": (
        JobKind.DEPLOYMENT,
        'print(\'{"status": "failed", "message": "no such server"}\')\n',
        EndReason.RESULT_FAILED,
        {"detail": "no such server"},
    ),
    "answer_is_an_error": (
        JobKind.INFERENCE_COMPLETE,
        'print(\'{"status": "error", "error": "too long"}\')\n',
        EndReason.SCRIPT_REPORTED_FAILURE,
        {"detail": "too long"},
    ),
}


class TestScripts:
    async def test_each_failure_has_its_reason(self, any_site: Site) -> None:
        # a saving without a model would be judged as a training
        method = await add_method(any_site.database, "made-elsewhere")
        adapter = await insert_model(any_site.database, method_id=method, job_id=None, path="models/adapter")
        (any_site.home.models / "adapter").mkdir()
        of = {JobKind.SAVING: {"model_id": adapter}}
        ids = {
            name: await any_site.submit(text, kind, **of.get(kind, {})) for name, (kind, text, _, _) in CASES.items()
        }

        any_site.start_worker(DEEPE_SLOTS="3")
        rows = {name: await any_site.wait(job_id) for name, job_id in ids.items()}

        told = {name: (row.status, row.reason) for name, row in rows.items()}
        assert told == {name: (JobStatus.FAILED, reason) for name, (_, _, reason, _) in CASES.items()}
        for name, (_, _, _, params) in CASES.items():
            assert params.items() <= rows[name].reason_params.items(), name
        assert rows["exit_code"].reason_params["log_tail"] == ["no"]
        assert await any_site.models() == {}

    async def test_failure_ends_what_waits_for_it(self, site: Site) -> None:
        ids = await site.submit_chain((JobKind.TRAINING, "raise SystemExit(3)\n"), (JobKind.SAVING, SAVE))

        site.start_worker()
        rows = await site.wait_for_end(*ids)

        assert (rows[1].status, rows[1].reason) == (JobStatus.CANCELLED, EndReason.PREDECESSOR_FAILED)
        assert rows[1].reason_params == {"predecessor": ids[0]}


class TestLaunch:
    async def test_what_cannot_be_launched_has_its_reason(self, site: Site) -> None:
        missing = Named(id="x", name="gone", path="models/gone")
        lost = await site.job(TRAIN)
        lost.launch["script"]["tree"] = "0" * 64
        newer = await site.job()
        newer.launch = {"from": "a newer version of the service"}
        blocked = await site.job()
        (site.home.runs / blocked.id).write_text("a file where a folder should be")
        cases = {
            EndReason.ENV_MISSING: [await site.job(environment="unheard-of")],
            EndReason.INPUT_MISSING: [
                await site.job(spec={"base_model": missing}),
                await site.job(spec={"dataset": missing}),
                await site.job(SAVE, JobKind.SAVING, model_id="no-such-model"),
            ],
            EndReason.SCRIPT_MISSING: [lost],
            EndReason.SPAWN_FAILED: [newer, blocked],
        }
        reasons = {job.id: reason for reason, jobs in cases.items() for job in jobs}
        await site.insert(*(job for jobs in cases.values() for job in jobs))
        sound = await site.submit()

        worker = site.start_worker()
        rows = {job_id: await site.wait(job_id) for job_id in reasons}

        assert {job_id: (row.status, row.reason) for job_id, row in rows.items()} == {
            job_id: (JobStatus.FAILED, reason) for job_id, reason in reasons.items()
        }
        assert rows[blocked.id].reason_params["detail"].endswith(f"/{blocked.id}/1/output'")
        assert (await site.wait(sound)).status is JobStatus.SUCCEEDED
        assert "Traceback" not in worker.log

    async def test_pinned_bytes_run_whatever_became_of_the_file(self, site: Site) -> None:
        """Beside their neighbour `play`, which they import."""
        ids = [await site.submit(TRAIN, file=file) for file in ("gone.py", "edited.py")]
        (site.home.scripts / "gone.py").unlink()
        (site.home.scripts / "edited.py").write_text("raise SystemExit('the edited one')\n")

        site.start_worker()
        rows = await site.wait_for_end(*ids)

        assert [row.status for row in rows] == [JobStatus.SUCCEEDED] * 2, site.story(rows[1])
