"""Every way to fail has its reason, and what is pinned is what runs."""

from typing import Any

import pytest

from app.domain.enums import EndReason, JobKind, JobStatus
from app.registry.version_store import VersionStore
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
        ids = {name: await any_site.submit(text, kind) for name, (kind, text, _, _) in CASES.items()}

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
    async def test_environment_that_nobody_can_build(self, site: Site) -> None:
        job_id = await site.submit(environment="unheard-of")

        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.ENV_MISSING)
        assert row.reason_params["environment"] == "unheard-of"

    @pytest.mark.parametrize("missing", ["base_model", "dataset"])
    async def test_input_that_is_gone(self, site: Site, missing: str) -> None:
        job_id = await site.submit()
        (site.home.models / "base").rmdir() if missing == "base_model" else (site.home.datasets / "rows.jsonl").unlink()

        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.INPUT_MISSING)

    async def test_stored_bytes_run_if_the_file_is_gone(self, site: Site) -> None:
        VersionStore(site.home.versions).put(TRAIN.encode())
        job_id = await site.submit(TRAIN, file="gone.py")
        (site.home.scripts / "gone.py").unlink()

        site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)  # with its neighbour `play` on the path

    async def test_pinned_bytes_run_if_the_file_was_edited(self, site: Site) -> None:
        VersionStore(site.home.versions).put(TRAIN.encode())
        job_id = await site.submit(TRAIN, file="edited.py")
        (site.home.scripts / "edited.py").write_text("raise SystemExit('the edited one')\n")

        site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)

    async def test_bytes_that_are_nowhere(self, site: Site) -> None:
        job_id = await site.submit(TRAIN, file="lost.py")
        (site.home.scripts / "lost.py").unlink()

        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SCRIPT_MISSING)

    async def test_job_that_cannot_be_read_fails_and_the_next_one_runs(self, site: Site) -> None:
        """Such as one that a newer version of the service wrote."""
        broken = await site.job()
        broken.launch = {"from": "the future"}
        (first,) = await site.insert(broken)
        second = await site.submit()

        site.start_worker()
        rows = await site.wait_for_end(first, second)

        assert (rows[0].status, rows[0].reason) == (JobStatus.FAILED, EndReason.SPAWN_FAILED)
        assert rows[1].status is JobStatus.SUCCEEDED

    async def test_run_folder_that_cannot_be_written(self, site: Site) -> None:
        job_id = await site.submit()
        (site.home.runs / job_id).write_text("a file where a folder should be")

        site.start_worker()
        row = await site.wait(job_id)

        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.SPAWN_FAILED)
        assert job_id in row.reason_params["detail"]
