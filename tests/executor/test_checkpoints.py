"""Which checkpoint the next attempt gets: declared whole by the helper, or as transformers' Trainer leaves it."""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from app.executor.attempts import checkpoints
from app.executor.attempts.checkpoints import MANIFEST, Checkpoint, hand_on, newest_checkpoint, sampled_digest
from app.presets.catalogue import helpers_dir
from app.store.home import Home

JOB = "11111111-2222-4333-8444-555555555555"
MIB = 1024 * 1024


def load_helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepe_under_test", helpers_dir() / "deepe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deepe = load_helper()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.create()
    return home


def folder_of(home: Home, attempt: int, step: int, *, job: str = JOB) -> Path:
    folder = home.run_folder(job, attempt) / "output" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    return folder


def declared(home: Home, attempt: int, step: int, *, job: str = JOB) -> Path:
    """Write a checkpoint of a format of its own, declared by the helper."""
    folder = folder_of(home, attempt, step, job=job)
    (folder / "state").mkdir()
    (folder / "state" / "numbers").write_bytes(bytes([attempt]) * 1000)
    (folder / "config.json").write_text("{}")
    deepe.checkpoint(folder, step)
    return folder


def trainers(home: Home, attempt: int, step: int) -> Path:
    """Write what transformers' Trainer leaves."""
    folder = folder_of(home, attempt, step)
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for name in ("optimizer.pt", "scheduler.pt"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data.pkl", b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def newest(home: Home, **which: int) -> Checkpoint | None:
    return newest_checkpoint(home, JOB, **which)


class TestNewest:
    def test_job_without_runs_has_none(self, home: Home) -> None:
        assert newest(home) is None

    def test_farthest_of_all_attempts_before_this_one(self, home: Home) -> None:
        declared(home, 1, 100)
        second = declared(home, 2, 300)
        declared(home, 2, 200)
        declared(home, 3, 400)

        found = newest(home, before=3)

        assert found == Checkpoint(job_id=JOB, attempt=2, folder=second, step=300)
        assert found.record() == {"job": JOB, "attempt": 2, "checkpoint": "checkpoint-300", "step": 300}

    def test_one_of_the_trainer_counts_without_a_manifest(self, home: Home) -> None:
        folder = trainers(home, 1, 10)

        found = newest(home)

        assert found is not None
        assert found.folder == folder

    def test_any_name_counts_when_it_was_declared(self, home: Home) -> None:
        folder = declared(home, 1, 7)
        folder.rename(folder.with_name("best"))

        found = newest(home)

        assert found is not None
        assert (found.folder.name, found.step) == ("best", 7)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "state" / "numbers").write_bytes(bytes([9]) * 1000),
            lambda folder: (folder / "state" / "numbers").write_bytes(b""),
            lambda folder: (folder / "config.json").unlink(),
            lambda folder: (folder / MANIFEST).write_text("{"),
            lambda folder: (folder / MANIFEST).write_text('{"format": 1, "step": 300, "files": []}'),
            lambda folder: (folder / MANIFEST).write_text('{"format": 1, "step": -3, "files": [1]}'),
            lambda folder: (folder / MANIFEST).write_text('{"format": 1, "step": 300, "files": [{"path": 3}]}'),
            lambda folder: (folder / MANIFEST).write_text('{"format": 2, "step": 300, "files": [1]}'),
            lambda folder: (folder / MANIFEST).write_text("[]"),
            lambda folder: (folder / MANIFEST).unlink(),
        ],
    )
    def test_damaged_one_is_passed_over(self, home: Home, damage: Callable[[Path], object]) -> None:
        declared(home, 1, 100)
        damage(declared(home, 2, 300))

        found = newest(home)

        assert found is not None
        assert found.step == 100

    def test_file_outside_of_the_folder_is_no_part_of_it(self, home: Home) -> None:
        folder = declared(home, 1, 100)
        outside = folder.parent / "secret"
        outside.write_bytes(b"1")
        entry = {"path": "../secret", "size": 1, "sha256": sampled_digest(outside)}
        (folder / MANIFEST).write_text(json.dumps({"format": 1, "step": 100, "files": [entry]}))

        assert newest(home) is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "trainer_state.json").unlink(),
            lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 9}'),
            lambda folder: (folder / "trainer_state.json").write_text('{"global_st'),
            lambda folder: (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-9]),
            lambda folder: os.truncate(folder / "adapter_model.safetensors", 60),
            lambda folder: [path.unlink() for path in folder.glob("*.[ps][ta]*")],
        ],
    )
    def test_trainer_that_was_killed_while_it_wrote_is_passed_over(
        self, home: Home, damage: Callable[[Path], object]
    ) -> None:
        damage(trainers(home, 1, 10))

        assert newest(home) is None

    def test_folders_of_other_kinds_and_links_are_no_checkpoints(self, home: Home) -> None:
        folder = declared(home, 1, 100)
        hidden = folder.rename(folder.with_name(".checkpoint-100"))
        (folder.parent / "checkpoint-200").symlink_to(hidden)
        (folder.parent / "checkpoint-300").write_text("a file")

        assert newest(home) is None


class TestDigest:
    @pytest.mark.parametrize("size", [0, 1, MIB, 64 * MIB, 64 * MIB + 1])
    def test_helper_and_platform_agree(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "file"
        path.touch()
        os.truncate(path, size)

        assert deepe._digest(path) == sampled_digest(path)

    def test_large_file_is_sampled_from_end_to_end(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        os.truncate(path, 256 * MIB)
        before = sampled_digest(path)

        for offset in (0, 256 * MIB - 1):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"x")
            assert sampled_digest(path) != before
            before = sampled_digest(path)

    def test_full_disk_does_not_end_the_training(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        deepe.checkpoint(tmp_path / "absent", 1)

        assert "cannot declare absent" in capsys.readouterr().err


class TestHandOn:
    def hand_on(self, home: Home) -> tuple[Path, Path]:
        found = newest(home)
        assert found is not None
        output = home.run_folder(JOB, 2) / "output"
        output.mkdir(parents=True, exist_ok=True)
        return found.folder, hand_on(found, output)

    def test_links_and_leaves_the_original(self, home: Home) -> None:
        declared(home, 1, 100)

        source, target = self.hand_on(home)

        assert (target / "state" / "numbers").samefile(source / "state" / "numbers")
        assert checkpoints.whole_step(target) == checkpoints.whole_step(source) == 100

    def test_twice_is_once(self, home: Home) -> None:
        declared(home, 1, 100)
        source, first = self.hand_on(home)
        (source.parent.parent.parent / "2" / "output" / ".checkpoint-100.handed-on").mkdir()

        _, second = self.hand_on(home)

        assert first == second

    def test_copies_where_links_fail(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        declared(home, 1, 100)

        source, target = self.hand_on(home)

        assert not (target / "config.json").samefile(source / "config.json")
        assert checkpoints.whole_step(target) == 100

    @pytest.mark.parametrize(("whole", "expected"), [(True, {100, 300}), (False, {300})])
    def test_trainers_best_goes_with_it_if_it_is_whole(self, home: Home, whole: bool, expected: set[int]) -> None:
        best, _ = trainers(home, 1, 100), trainers(home, 1, 200)
        (trainers(home, 1, 300) / "trainer_state.json").write_text('{"global_step": 300, "best_global_step": 100}')
        if not whole:
            (best / "optimizer.pt").write_bytes(b"")

        _, target = self.hand_on(home)

        assert {checkpoints.whole_step(folder) for folder in target.parent.iterdir()} == expected

    def test_links_inside_are_left_out(self, home: Home) -> None:
        folder = declared(home, 1, 100)
        (folder / "elsewhere").symlink_to("/")

        _, target = self.hand_on(home)

        assert not (target / "elsewhere").exists()
