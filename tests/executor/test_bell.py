"""Bells between processes of one machine."""

import asyncio
import os
import stat
from pathlib import Path

from app.executor.engines.wakeup_fifo import listening, strike
from tests.executor.attempts import attempts


class TestBell:
    async def test_wakes_its_listener_at_every_stroke(self, tmp_path: Path) -> None:
        heard = asyncio.Event()
        with listening(tmp_path / "bell", heard.set):
            for _ in range(3):
                heard.clear()
                await asyncio.to_thread(strike, tmp_path / "bell")
                await heard.wait()

        assert stat.S_ISFIFO((tmp_path / "bell").stat().st_mode)

    async def test_is_silent_once_nobody_listens(self, tmp_path: Path) -> None:
        with listening(tmp_path / "bell", lambda: None):
            pass

        strike(tmp_path / "bell")
        strike(tmp_path / "no-bell")

    async def test_more_strokes_than_a_fifo_holds_block_nobody(self, tmp_path: Path) -> None:
        heard = asyncio.Event()
        with listening(tmp_path / "bell", heard.set):
            for _ in range(70_000):
                strike(tmp_path / "bell")
            await heard.wait()

    async def test_a_file_in_its_place_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "bell").write_text("mine")

        strike(tmp_path / "bell")

        assert (tmp_path / "bell").read_text() == "mine"

    async def test_where_no_bell_can_hang_its_listener_goes_on_without(self, tmp_path: Path) -> None:
        with listening(tmp_path / "no-folder" / "bell", lambda: None):
            pass


class TestSupervisor:
    async def test_strikes_when_the_stage_is_recorded_and_when_it_has_ended(self, tmp_path: Path) -> None:
        for make in attempts(tmp_path):
            attempt = make()
            heard = asyncio.Event()
            with listening(attempt.folder.parents[1] / ".bell", heard.set):
                attempt.start("import time\nprint('ready')\ntime.sleep(60)")
                await heard.wait()
                assert attempt.observe().process is not None

                await asyncio.to_thread(attempt.wait_for_line, "ready")
                heard.clear()
                os.kill(attempt.stage().pid, 15)
                await heard.wait()
                assert attempt.observe().exit is not None
