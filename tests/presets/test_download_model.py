"""The download of a model from a hub: continued, compared, and there as a whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.presets.catalogue import download_program, helpers_dir
from tests.hub import COMMIT, Hub, hub

WEIGHTS = os.urandom(3_000_000)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "1_Pooling/config.json": b"{}",
    "pytorch_model.bin": b"the same once more",
    "onnx/model.onnx": b"x",
    "original/params.json": b"{}",
    ".gitattributes": b"x",
}
WANTED = ["1_Pooling/config.json", "config.json", "model.safetensors"]


def run(server: Hub, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a worker does."""
    return subprocess.run(
        [
            sys.executable, str(download_program()), f"--repository={server.repository}",
            f"--draft={folder / 'draft'}", f"--output={folder / 'tiny'}",
        ],
        env={
            "PATH": os.defpath, "PYTHONPATH": str(helpers_dir()), "HF_ENDPOINT": server.url, "NO_PROXY": "*",
            "DEEPE_EVENTS": str(folder / "events.jsonl"), "DEEPE_DOWNLOAD_PAUSE_SECONDS": "0", **environment,
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def progress(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "progress"]


class TestDownload:
    def test_brings_what_a_training_needs(self, tmp_path: Path) -> None:
        with hub(FILES) as server:
            done = run(server, tmp_path)

        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "tiny") == {name: FILES[name] for name in WANTED}
        assert COMMIT in done.stdout
        assert (progress(tmp_path)[-1]["step"], progress(tmp_path)[-1]["total"]) == (2, 2)
        assert not (tmp_path / "draft").exists()

    def test_goes_on_where_a_connection_broke(self, tmp_path: Path) -> None:
        with hub(FILES, cut=[("model.safetensors", 1_000_000), ("model.safetensors", 2_500_000)]) as server:
            done = run(server, tmp_path)

            assert done.returncode == 0, done.stderr
            assert server.read("model.safetensors") == [None, "bytes=1000000-", "bytes=2500000-"]
        assert contents(tmp_path / "tiny")["model.safetensors"] == WEIGHTS

    def test_a_second_run_goes_on_where_the_first_ended(self, tmp_path: Path) -> None:
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / "config.json").write_bytes(FILES["config.json"])
        (tmp_path / "draft" / "model.safetensors.incomplete").write_bytes(WEIGHTS[:500])
        (tmp_path / "draft" / "left-of-another-revision.json").write_bytes(b"x")
        with hub(FILES) as server:
            done = run(server, tmp_path)

            assert done.returncode == 0, done.stderr
            assert (server.read("model.safetensors"), server.read("config.json")) == (["bytes=500-"], [])
        assert sorted(contents(tmp_path / "tiny")) == WANTED

    @pytest.mark.parametrize("there", [b"x" * 500, WEIGHTS + b"x", bytes(len(WEIGHTS))], ids=["start", "long", "all"])
    def test_bytes_that_are_not_the_hubs_are_brought_anew(self, tmp_path: Path, there: bytes) -> None:
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / "model.safetensors.incomplete").write_bytes(there)
        with hub(FILES, wrong={"config.json"}) as server:
            done = run(server, tmp_path)

        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "tiny") == {name: FILES[name] for name in WANTED}

    def test_a_hub_that_sends_whole_files_only(self, tmp_path: Path) -> None:
        with hub(FILES, cut=[("model.safetensors", 1_000_000)], ignores_range=True) as server:
            assert run(server, tmp_path).returncode == 0
        assert contents(tmp_path / "tiny")["model.safetensors"] == WEIGHTS

    def test_waits_out_what_passes(self, tmp_path: Path) -> None:
        with hub(FILES, failures=3) as server:
            assert run(server, tmp_path).returncode == 0

    def test_the_token_stays_with_the_hub(self, tmp_path: Path) -> None:
        with hub(FILES, token="secret-of-the-hub") as server:
            refused = run(server, tmp_path)
            done = run(server, tmp_path, HF_TOKEN="secret-of-the-hub")

            assert (refused.returncode, done.returncode) == (1, 0), done.stderr
            assert server.tokens_at_cdn == [None]
        assert "HF_TOKEN" in refused.stderr
        assert "secret-of-the-hub" not in done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            ({"../out.json": b"{}", "config.json": b"{}"}, "outside of the model"),
            ({"/etc/x": b"{}", "config.json": b"{}"}, "outside of the model"),
            ({"README.md": b"x"}, "no config.json"),
        ],
    )
    def test_refuses_what_is_no_model(self, tmp_path: Path, files: dict[str, bytes], said: str) -> None:
        with hub(files) as server:
            done = run(server, tmp_path)

        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert said in done.stderr
        assert not (tmp_path / "tiny").exists()

    def test_names_what_is_not_there(self, tmp_path: Path) -> None:
        with hub(FILES) as server:
            server.repository = "org/other"
            known = Hub({}, repository="org/tiny", port=server.port)
            done = run(known, tmp_path)

        assert done.returncode == 1
        assert "no such model" in done.stderr
        nobody = run(Hub({}, port=9), tmp_path)
        assert (nobody.returncode, "could not be read" in nobody.stderr) == (1, True)
        assert run(Hub({}), tmp_path, HF_ENDPOINT="file:///etc").returncode == 1

    def test_of_two_precisions_one_is_brought(self, tmp_path: Path) -> None:
        files = {
            "model_index.json": b"{}", "unet/model.safetensors": b"a", "unet/model.fp16.safetensors": b"b",
            "vae/model.fp16.safetensors": b"c",
        }  # fmt: skip
        with hub(files) as server:
            assert run(server, tmp_path).returncode == 0
        assert sorted(contents(tmp_path / "tiny")) == [
            "model_index.json", "unet/model.safetensors", "vae/model.fp16.safetensors",
        ]  # fmt: skip
