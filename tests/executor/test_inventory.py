"""What a worker finds on its machine, and which cards it leaves to others.

The readings are written after the documentation of NVML and `system_profiler`: no card and no Mac was at hand.
"""

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.domain.accelerators import AcceleratorKind
from app.domain.inventory import Inventory, Obstacle
from app.executor.nodes import inventory as module
from app.executor.nodes.apple import apple_accelerator
from app.executor.nodes.cards import accelerator_of, blocked_cards, visible_cards
from app.executor.nodes.inventory import belongs_to_attempt, find_accelerators, machine, simulated_accelerators
from app.executor.nodes.nvml import CardProcess, CardReading, NvmlCards
from tests.executor.machines import Cards, machine_with

A100 = CardReading(
    uuid="GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    index=0,
    name="NVIDIA A100-SXM4-40GB",
    memory_mib=40_960,
    used_mib=4,
    driver="550.54.15",
)
L4 = CardReading(
    uuid="GPU-1f0a3b5c-0000-4106-c12f-20bd9faed9f6",
    index=1,
    name="NVIDIA L4",
    memory_mib=23_034,
    used_mib=1,
    driver="550.54.15",
)
MIG = [
    CardReading(
        uuid=f"MIG-{name}-27a3-5b2a-8a33-6f2f3a1b0c0d",
        index=2,
        name="NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        memory_mib=20_096,
        used_mib=13,
        driver="550.54.15",
        parent="GPU-77777777-d72c-4106-c12f-20bd9faed9f6",
    )
    for name in ("aaaaaaaa", "bbbbbbbb")
]
ALL = [A100, L4, *MIG]

# the form of `system_profiler SPDisplaysDataType -json` for a Mac with two displays, written by hand
STUDIO = {
    "SPDisplaysDataType": [
        {
            "_name": "kHW_AppleM2MaxItem",
            "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
            "spdisplays_ndrvs": [{"_name": "DELL U2720Q"}, {"_name": "DELL U2720Q"}],
            "spdisplays_vendor": "sppci_vendor_Apple",
            "sppci_bus": "spdisplays_builtin",
            "sppci_cores": "38",
            "sppci_device_type": "spdisplays_gpu",
            "sppci_model": "Apple M2 Max",
        }
    ]
}


class TestVisible:
    @pytest.mark.parametrize(
        ("visible", "seen"),
        [
            (None, ALL),
            ("", []),
            ("-1", []),
            ("NoDevFiles", []),
            ("1", [L4]),
            ("1, 0", [L4, A100]),
            ("0,9,1", [A100]),  # what follows an entry that names nothing does not count
            ("0,0", [A100]),
            ("2", MIG),
            ("GPU-8932", [A100]),
            (L4.uuid, [L4]),
            ("GPU-7777", MIG),
            (MIG[1].uuid, [MIG[1]]),
            ("gpu-8932", []),
        ],
    )
    def test_as_cuda_reads_the_variable(self, visible: str | None, seen: list[CardReading]) -> None:
        assert list(visible_cards(ALL, visible)) == seen


class TestBlocked:
    def blocked(self, card: CardReading, *ours: int, threshold: int = 1024) -> list[tuple[Obstacle, Any, Any]]:
        found = blocked_cards([card.uuid], [card], is_owned=set(ours).__contains__, threshold_mib=threshold)
        return [(entry.obstacle, entry.used_mib, entry.pids) for entry in found]

    def used(self, mib: int, *processes: tuple[int, int | None]) -> CardReading:
        return dataclasses.replace(
            A100, used_mib=mib, processes=tuple(CardProcess(pid, memory) for pid, memory in processes)
        )

    def test_card_of_a_stranger(self) -> None:
        assert self.blocked(self.used(30_500, (22, 20_000), (11, 10_300))) == [(Obstacle.OCCUPIED, 30_464, (11, 22))]

    def test_little_memory_is_a_desktop_not_a_training(self) -> None:
        assert self.blocked(self.used(700, (11, 650))) == []
        assert self.blocked(self.used(700, (11, 650)), threshold=600) == [(Obstacle.OCCUPIED, 512, (11,))]

    def test_what_our_own_jobs_use(self) -> None:
        assert self.blocked(self.used(30_500, (11, 30_000)), 11) == []

    def test_stranger_beside_our_own_job(self) -> None:
        assert self.blocked(self.used(30_500, (11, 10_000), (22, 20_000)), 11) == [(Obstacle.OCCUPIED, 20_480, (22,))]

    def test_processes_that_another_container_hides(self) -> None:
        assert self.blocked(self.used(30_500)) == [(Obstacle.OCCUPIED, 30_464, ())]

    def test_driver_that_does_not_tell_how_much_a_process_uses(self) -> None:
        assert self.blocked(self.used(30_500, (11, None)), 11) == []
        assert self.blocked(self.used(30_500, (22, None))) == [(Obstacle.OCCUPIED, 30_464, (22,))]

    def test_card_that_fell_off_the_bus(self) -> None:
        (entry,) = blocked_cards([A100.uuid], [L4], is_owned=lambda pid: False, threshold_mib=1024)

        assert (entry.id, entry.obstacle, entry.used_mib) == (A100.uuid, Obstacle.MISSING, None)


class TestFound:
    def test_cards_that_the_worker_may_see(self) -> None:
        found = find_accelerators(Cards(*ALL), {"CUDA_VISIBLE_DEVICES": "2,0"})

        assert [one.id for one in found] == [MIG[0].uuid, MIG[1].uuid, A100.uuid]
        assert found[2] == accelerator_of(A100)
        assert found[2].document() == {
            "id": A100.uuid,
            "index": 0,
            "kind": "cuda",
            "name": "NVIDIA A100-SXM4-40GB",
            "memory_mib": 40_960,
            "driver": "550.54.15",
        }

    def test_none_while_the_driver_is_in_trouble(self, caplog: pytest.LogCaptureFixture) -> None:
        cards = Cards()
        cards.cards = None

        with caplog.at_level(logging.WARNING):
            assert find_accelerators(cards, {}) == ()

        assert [record.message for record in caplog.records] == ["cards_unreadable"]

    @pytest.mark.parametrize(("text", "memory", "count"), [("8x40000", 40_000, 8), ("2", None, 2), ("0", None, 0)])
    def test_simulated_ones_take_the_place_of_real_ones(self, text: str, memory: int | None, count: int) -> None:
        found = find_accelerators(Cards(A100), {}, simulated=text)

        assert found == simulated_accelerators(text)
        assert len({one.id for one in found}) == count
        assert {(one.kind, one.memory_mib) for one in found} <= {(AcceleratorKind.SIMULATED, memory)}

    def test_machine_without_driver_has_no_cards(self) -> None:
        without = "import sys; sys.modules['pynvml'] = None\n"
        code = without + "from app.executor.nodes.nvml import NvmlCards\nassert not NvmlCards().read()"

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        if not Path("/dev/nvidiactl").exists():
            assert NvmlCards().read() == ()

    def test_worker_does_not_import_the_library_before_it_asks(self) -> None:
        code = "import sys, app.worker\nassert 'pynvml' not in sys.modules"

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestApple:
    @pytest.mark.parametrize(
        ("displays", "name", "driver"),
        [
            (STUDIO, "Apple M2 Max, 38 GPU cores", "Metal 3"),
            ({}, "Apple M2 Max", None),
            ({"SPDisplaysDataType": "broken"}, "Apple M2 Max", None),
            (
                {"SPDisplaysDataType": [{"spdisplays_vendor": "sppci_vendor_amd", "sppci_model": "x"}]},
                "Apple M2 Max",
                None,
            ),
        ],
    )
    def test_reads_what_the_system_says(self, displays: Mapping[str, Any], name: str, driver: str | None) -> None:
        found = apple_accelerator(displays, memory_bytes=64 * 1024**3, chip="Apple M2 Max")

        assert (found.name, found.driver, found.memory_mib) == (name, driver, 65_536)
        assert (found.kind, found.index) == (AcceleratorKind.APPLE, 0)

    def test_says_what_it_can_when_nothing_answers(self) -> None:
        found = apple_accelerator({}, memory_bytes=None, chip="")

        assert (found.name, found.memory_mib) == ("Apple silicon", None)


class TestHardware:
    async def test_leaves_a_card_alone_while_somebody_else_uses_it(self, tmp_path: Path) -> None:
        cards = Cards(A100, L4)
        hardware = machine_with(tmp_path, accelerator_of(A100), accelerator_of(L4), cards=cards)
        assert [one.id for one in await hardware.usable()] == [A100.uuid, L4.uuid]

        cards.cards = [dataclasses.replace(A100, used_mib=9_000, processes=(CardProcess(7, 8_900),)), L4]
        assert [one.id for one in await hardware.usable()] == [L4.uuid]
        (blocked,) = (await hardware.inventory()).blocked
        assert (blocked.id, blocked.pids) == (A100.uuid, (7,))

        cards.cards = [A100, L4]
        assert len(await hardware.usable()) == 2

    async def test_leases_nothing_while_the_driver_is_in_trouble(self, tmp_path: Path) -> None:
        cards = Cards(A100)
        hardware = machine_with(tmp_path, accelerator_of(A100), cards=cards)

        cards.cards = None
        assert await hardware.usable() == []
        assert hardware.accelerators == (accelerator_of(A100),)

        cards.cards = [A100]
        assert len(await hardware.usable()) == 1

    async def test_driver_that_hangs_holds_up_one_look_and_one_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
        goes_on, calls = threading.Event(), []

        class Hanging(Cards):
            def read(self) -> list[CardReading]:
                calls.append(1)
                goes_on.wait(20)
                return [A100]

        hardware = machine_with(tmp_path, accelerator_of(A100), cards=Hanging())
        try:
            for _ in range(3):
                assert await hardware.usable() == []
            assert len(calls) == 1
        finally:
            goes_on.set()
        while not await hardware.usable():
            pass

    async def test_looks_again_after_a_while_only(self, tmp_path: Path) -> None:
        now = [0.0]
        cards = Cards(A100)
        hardware = machine_with(tmp_path, accelerator_of(A100), cards=cards, monotonic=lambda: now[0])
        await hardware.usable()

        cards.cards = []
        assert len(await hardware.usable()) == 1
        now[0] = module.LOOK_SECONDS
        assert await hardware.usable() == []

    async def test_simulated_and_apple_ones_are_never_taken_by_others(self, tmp_path: Path) -> None:
        hardware = machine_with(tmp_path, *simulated_accelerators("2"), cards=Cards())

        assert len(await hardware.usable()) == 2

    async def test_tells_what_the_machine_is(self, tmp_path: Path) -> None:
        told = await machine_with(tmp_path).inventory()

        assert (told.cpus > 0, told.memory_bytes > 2**20, told.hostname != "") == (True, True, True)
        assert told.home is not None
        assert 0 <= told.home.free_bytes <= told.home.total_bytes
        assert Inventory.model_validate(told.model_dump(mode="json")) == told

    async def test_disk_that_cannot_be_asked_is_unknown(self, tmp_path: Path) -> None:
        assert (await machine_with(tmp_path / "gone").inventory()).home is None

    def test_machine_is_asked_once(self) -> None:
        assert machine() is machine()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestOurs:
    def test_process_with_the_mark_of_an_attempt_of_this_node(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        for name, ours in (("mine", True), ("theirs", False), ("../attempts/mine", False)):
            variables = {**os.environ, "DEEPE_ATTEMPT": name}
            process = subprocess.Popen(
                [sys.executable, "-c", "print('ready', flush=True); input()"],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"  # before, the kernel may not show its variables yet
            try:
                assert belongs_to_attempt(tmp_path, process.pid) is ours
            finally:
                process.communicate(b"\n")

        assert not belongs_to_attempt(tmp_path, 2**22 + 1)
