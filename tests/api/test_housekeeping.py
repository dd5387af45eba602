"""Housekeeping over HTTP."""

from pathlib import Path

from app.api.routes import housekeeping
from app.domain.enums import JobStatus
from app.store.session import Database
from tests.api.client import methods_app
from tests.job_rows import START, add_job


async def test_shows_what_would_go_and_removes_it(database: Database, tmp_path: Path) -> None:
    async with methods_app(database, tmp_path / "home", routers=(housekeeping.router,)) as app:
        job_id = await add_job(database, status=JobStatus.FAILED, finished_at=START)
        log = app.home.run_folder(job_id, 1) / "output.log"
        log.parent.mkdir(parents=True)
        log.write_bytes(b"hello")

        would = await app.client.post("/api/v1/housekeeping:run", json={"dry_run": True})
        assert log.exists()
        went = await app.client.post("/api/v1/housekeeping:run")

    assert would.json()["dry_run"] is True
    assert (would.json()["size_bytes"], went.json()["size_bytes"]) == (5, 5)
    assert {"kind": "failed_runs", "count": 1, "size_bytes": 5} in went.json()["items"]
    assert not log.exists()
