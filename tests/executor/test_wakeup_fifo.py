"""FIFOs between processes of one machine."""

import asyncio
import os
import stat
from pathlib import Path

from app.executor.engines.wakeup_fifo import listening, notify
from tests.executor.attempts import attempts


class TestWakeupFifo:
    async def test_wakes_its_listener_at_every_stroke(self, tmp_path: Path) -> None:
        woken = asyncio.Event()
        with listening(tmp_path / "fifo", woken.set):
            for _ in range(3):
                woken.clear()
                await asyncio.to_thread(notify, tmp_path / "fifo")
                await woken.wait()

        assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)

    async def test_is_silent_once_nobody_listens(self, tmp_path: Path) -> None:
        with listening(tmp_path / "fifo", lambda: None):
            pass

        notify(tmp_path / "fifo")
        notify(tmp_path / "no-fifo")

    async def test_more_strokes_than_a_fifo_holds_block_nobody(self, tmp_path: Path) -> None:
        woken = asyncio.Event()
        with listening(tmp_path / "fifo", woken.set):
            for _ in range(70_000):
                notify(tmp_path / "fifo")
            await woken.wait()

    async def test_a_file_in_its_place_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "fifo").write_text("mine")

        notify(tmp_path / "fifo")

        assert (tmp_path / "fifo").read_text() == "mine"

    async def test_listener_goes_on_without_a_fifo_where_none_can_be_made(self, tmp_path: Path) -> None:
        with listening(tmp_path / "no-folder" / "fifo", lambda: None):
            pass


class TestSupervisor:
    async def test_notifies_when_the_stage_is_recorded_and_when_it_has_ended(self, tmp_path: Path) -> None:
        for make in attempts(tmp_path):
            attempt = make()
            woken = asyncio.Event()
            with listening(attempt.folder.parents[1] / ".bell", woken.set):
                attempt.start("import time\nprint('ready')\ntime.sleep(60)")
                await woken.wait()
                assert attempt.observe().process is not None

                await asyncio.to_thread(attempt.wait_for_line, "ready")
                woken.clear()
                os.kill(attempt.stage().pid, 15)
                await woken.wait()
                assert attempt.observe().exit is not None
