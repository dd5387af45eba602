"""A model of a hub becomes a base model: ordered, downloaded by a worker, checked and there for trainings."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from app.domain.enums import EndReason, JobStatus
from app.executor.jobs.base_model_builds import BaseModelDownloads
from app.executor.runs.run_folder import RunFolder
from app.registry.base_models.service import BaseModels, is_unmade
from app.store.jobs import get
from app.store.tables import BaseModelRow, JobRow
from tests.base_model_folders import model
from tests.hub import hub
from tests.worker.harness import Site


def now() -> datetime:
    return datetime.now(UTC)


async def order(site: Site) -> tuple[JobRow, bool]:
    base_models = BaseModels(home=site.home, clock=now)
    downloads = BaseModelDownloads(base_models=base_models, home=site.home, clock=now)
    async with site.database.writing() as session:
        return await downloads.order(session, name="tiny", repository="org/tiny", revision="main")


async def base_model(site: Site, job: JobRow) -> BaseModelRow:
    async with site.database.reading() as session:
        row = await session.get(BaseModelRow, (await get(session, job.id)).base_model_id)
    assert row is not None
    return row


async def test_a_download_that_broke_off_is_ordered_again_and_goes_on(site: Site, tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    weights = files["model.safetensors"]
    with hub({**files, "config.json": b"["}) as server:
        site.start_worker(HF_ENDPOINT=server.url, NO_PROXY="*")
        job, is_new = await order(site)
        again, is_newer = await order(site)
        broken = await site.wait(job.id)

        assert (is_new, is_newer, again.id) == (True, False, job.id)
        assert (broken.status, broken.reason) == (JobStatus.FAILED, EndReason.OUTPUT_INVALID)
        assert "config.json" in broken.reason_params["detail"]
        assert is_unmade(await base_model(site, job))

        shutil.rmtree(site.home.absolute((await base_model(site, job)).path))
        server.files = files
        repeated, _ = await order(site)
        done = await site.wait(repeated.id)

    row = await base_model(site, repeated)
    folder = site.home.absolute(row.path)
    assert (done.status, repeated.id == job.id, is_unmade(row)) == (JobStatus.SUCCEEDED, False, False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert (row.card["turn_end"], row.card["parameters"]) == ("<|im_end|>", 40)
    assert len(weights) < row.card["size_bytes"]
    assert '"progress"' in RunFolder(site.home.run_folder(repeated.id, 1)).events.read_text()
