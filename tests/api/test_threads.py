"""The threads of a running API: as many as wait for hostile files leave others free."""

import asyncio
import threading
from datetime import UTC, datetime
from pathlib import Path

from fastapi import FastAPI

from app.domain.projects import DEFAULT_SCOPE
from app.main import _lifespan, build_services
from app.settings import load_settings
from app.store.session import Database
from tests.api.client import SwitchableLicence


async def test_a_dozen_threads_that_wait_do_not_hold_up_the_next(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url, scope=DEFAULT_SCOPE)
    settings = load_settings(home=tmp_path / "home", database_url=sqlite_url, platform="cpu")
    services = build_services(settings, database, licence=SwitchableLicence(), clock=lambda: datetime.now(UTC))
    release = threading.Event()

    async with _lifespan(services, database, settings)(FastAPI()):
        waiting = [asyncio.create_task(asyncio.to_thread(release.wait)) for _ in range(12)]
        answered = await asyncio.to_thread(lambda: sum(task.done() for task in waiting))
        release.set()
        await asyncio.gather(*waiting)

    assert answered == 0
