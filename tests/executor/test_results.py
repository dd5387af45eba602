"""When is an attempt a success, and if not, why."""

import hashlib
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.enums import EndReason, JobKind
from app.domain.texts import Language, catalogue, text
from app.executor.attempts import artifacts
from app.executor.attempts.artifacts import (
    ArtifactKind,
    ArtifactProblem,
    ResultManifest,
    check_complete,
    check_customized,
    check_safetensors,
    digest_files,
    find_model,
    read_result,
    write_result,
)
from app.executor.attempts.classification import classify, last_words
from app.executor.attempts.results import judge, judge_printed_result
from app.executor.supervisor.client import ExitRecord, ExitWhy


def ended(why: str = "exited", code: int | None = 0, **overrides: Any) -> ExitRecord:
    """Return a supervisor's record of an end."""
    values: dict[str, Any] = {
        "attempt_id": "a",
        "signal": None,
        "error": None,
        "stop_reason": None,
        "oom_kills": 0,
        "leftovers": 0,
        "unkillable": 0,
        "max_rss_bytes": 1,
        "user_seconds": 1.0,
        "system_seconds": 1.0,
        "started_at": 1.0,
        "finished_at": 2.0,
    }
    return ExitRecord(why=ExitWhy(why), code=code, **(values | overrides))


def safetensors(tensors: dict[str, int], *, missing_bytes: int = 0) -> bytes:
    """Return a file of U8 tensors with the given sizes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    document = json.dumps(header).encode()
    return len(document).to_bytes(8, "little") + document + b"\x01" * (position - missing_bytes)


def write_adapter(folder: Path, *, missing_bytes: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(safetensors({"a": 8}, missing_bytes=missing_bytes))
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model-00001-of-00002.safetensors").write_bytes(safetensors({"a": 8}))
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors({"b": 4}))
    placed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


class TestJudgeTraining:
    def judge(
        self, output: Path, exit_record: ExitRecord, *, log: list[str] | None = None, status: int | None = None
    ) -> Any:
        return judge(JobKind.TRAINING, exit_record, log_tail=log or [], script_status=status, output_dir=output)

    def test_exit_0_with_a_model_is_success(self, tmp_path: Path) -> None:
        verdict = self.judge(write_adapter(tmp_path), ended(), status=1)

        assert (verdict.succeeded, verdict.reason) == (True, EndReason.COMPLETED)
        assert verdict.artifact.kind is ArtifactKind.ADAPTER

    def test_exit_3_fails_with_the_last_line_of_the_traceback(self, tmp_path: Path) -> None:
        log = ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "ValueError: bad rate"]

        verdict = self.judge(write_adapter(tmp_path), ended(code=3), log=log, status=1)

        assert (verdict.succeeded, verdict.reason) == (False, EndReason.EXIT_CODE)
        assert verdict.params == {"detail": "ValueError: bad rate", "exit_code": 3}

    def test_exit_0_with_failed_in_redis_is_a_failure(self, tmp_path: Path) -> None:
        verdict = self.judge(write_adapter(tmp_path), ended(), log=["loss went up"], status=3)

        assert (verdict.reason, verdict.detail) == (EndReason.SCRIPT_REPORTED_FAILURE, "loss went up")

    def test_failed_in_redis_names_the_cause_that_the_output_tells(self, tmp_path: Path) -> None:
        log = ["Training failed: CUDA out of memory. Tried to allocate 2.00 GiB."]

        assert self.judge(tmp_path, ended(), log=log, status=3).reason is EndReason.CUDA_OUT_OF_MEMORY

    def test_exit_0_without_output_is_a_failure(self, tmp_path: Path) -> None:
        assert self.judge(tmp_path, ended()).reason is EndReason.OUTPUT_MISSING
        assert self.judge(tmp_path / "none", ended()).reason is EndReason.OUTPUT_MISSING

    def test_exit_0_with_a_traceback_and_no_model_names_the_cause(self, tmp_path: Path) -> None:
        known = self.judge(tmp_path, ended(), log=[*TRACEBACK, "RuntimeError: CUDA out of memory. Tried 2.00 GiB"])
        other = self.judge(tmp_path, ended(), log=[*TRACEBACK, "ValueError: bad rate"])

        assert known.reason is EndReason.CUDA_OUT_OF_MEMORY
        assert other.reason is EndReason.OUTPUT_MISSING
        assert other.detail.endswith("; ValueError: bad rate")

    def test_exit_0_with_half_written_weights_is_a_failure(self, tmp_path: Path) -> None:
        verdict = self.judge(write_adapter(tmp_path, missing_bytes=1), ended())

        assert verdict.reason is EndReason.OUTPUT_INVALID
        assert "adapter_model.safetensors" in verdict.detail

    @pytest.mark.parametrize(
        ("exit_record", "reason"),
        [
            (ended(why="lost", code=None), EndReason.SUPERVISOR_LOST),
            (ended(code=None), EndReason.SUPERVISOR_LOST),
            (ended(why="reboot", code=None), EndReason.NODE_LOST),
            (ended(why="never_started", code=None), EndReason.SPAWN_FAILED),
            (ended(why="stopped", code=0, stop_reason="cancelled"), EndReason.CANCELLED),
        ],
    )
    def test_an_end_that_is_no_clean_exit_is_never_success(
        self, tmp_path: Path, exit_record: ExitRecord, reason: EndReason
    ) -> None:
        verdict = self.judge(write_adapter(tmp_path), exit_record)

        assert (verdict.succeeded, verdict.reason) == (False, reason)


class TestPrintedResult:
    @pytest.mark.parametrize(
        ("lines", "succeeded"),
        [
            (['{"status": "success", "message": "saved"}'], True),
            (["Loading shards: 100%", "warning: x", '{"status":"success"}', "cleanup done"], True),
            (['{"status":"success"}', '{"status":"error","message":"no"}'], False),
            (['{"status":"error"}', '{"status":"success"}'], True),
            (["{", '  "status": "success",', '  "parts": [', '    {"a": 1}', "  ]", "}"], True),
            (['{"status":"success"}', '{"level":"info","msg":"bye"}'], True),
            (['{"message":"success"}'], False),
            (['{"event": "loaded"}', "Model saved successfully"], True),
            (['{"event": "loaded"}', "{", '  "success": false', "}", "done"], False),
            (["Merge: SUCCESS!"], True),
            (["Model saved successfully"], True),
            (["the merge was unsuccessful"], False),
            (["done"], False),
            ([], False),
            (['[log_data]: {"msg": 500002, "msgDetail": "success"}'], False),
            (['INFO request {"status": "success"} was answered with failure', '{"status": "failed"}'], False),
            (["{broken", "success"], True),
        ],
    )
    def test_the_last_json_object_decides_else_the_word(self, lines: list[str], succeeded: bool) -> None:
        verdict = judge_printed_result(lines)

        assert verdict.succeeded is succeeded
        assert verdict.reason is (EndReason.COMPLETED if succeeded else EndReason.RESULT_FAILED)

    def test_the_message_of_a_failed_result_is_the_detail(self) -> None:
        verdict = judge_printed_result(['{"status": "error", "message": "Ollama does not answer"}'])

        assert verdict.detail == "Ollama does not answer"
        assert verdict.result == {"status": "error", "message": "Ollama does not answer"}

    def test_a_failed_result_with_a_known_cause_gets_its_reason(self) -> None:
        verdict = judge_printed_result(['{"status": "error", "message": "[Errno 28] No space left on device"}'])

        assert verdict.reason is EndReason.DISK_FULL

    def test_a_saving_that_makes_the_first_model_is_judged_as_a_training(self, tmp_path: Path) -> None:
        write_adapter(tmp_path)
        write_sharded(tmp_path / "saved")

        def saving(log: list[str], **more: Any) -> Any:
            return judge(
                JobKind.SAVING, ended(), log_tail=log, script_status=None, output_dir=tmp_path, produces=True, **more
            )

        assert saving(["=====6. Training Completed ====="]).artifact.root == tmp_path / "saved"
        assert saving(['{"status": "error", "message": "no room"}']).reason is EndReason.RESULT_FAILED
        assert saving([], output="elsewhere").reason is EndReason.OUTPUT_MISSING

    def test_saving_needs_success_exit_and_a_complete_model(self, tmp_path: Path) -> None:
        def saving(exit_record: ExitRecord, output: Path) -> Any:
            log = ['{"status":"success","message":"ok"}']
            return judge(JobKind.SAVING, exit_record, log_tail=log, script_status=None, output_dir=output)

        assert saving(ended(code=3), write_sharded(tmp_path / "model")).reason is EndReason.EXIT_CODE
        assert saving(ended(), tmp_path).reason is EndReason.OUTPUT_MISSING
        good = saving(ended(), tmp_path / "model")
        assert (good.succeeded, good.artifact.kind, good.result["message"]) == (True, ArtifactKind.MODEL, "ok")

    def test_deployment_needs_no_files(self, tmp_path: Path) -> None:
        log = ["pulling", '{"status":"success"}']

        assert judge(JobKind.DEPLOYMENT, ended(), log_tail=log, script_status=2, output_dir=tmp_path).succeeded


class TestJudgeInference:
    def judge(self, tmp_path: Path, *lines: str, code: int = 0) -> Any:
        return judge(
            JobKind.INFERENCE_COMPLETE, ended(code=code), log_tail=lines, script_status=None, output_dir=tmp_path
        )

    def test_exit_0_without_an_error_is_success(self, tmp_path: Path) -> None:
        assert self.judge(tmp_path, '{"status": "resp", "text": "error"}').succeeded

    def test_an_error_in_the_protocol_is_a_failure_whatever_the_exit_code(self, tmp_path: Path) -> None:
        line = '{"status": "error", "error": "no weights", "traceback": "..."}'

        silent, loud = self.judge(tmp_path, line), self.judge(tmp_path, line, code=1)

        assert (silent.reason, silent.detail) == (EndReason.SCRIPT_REPORTED_FAILURE, "no weights")
        assert (loud.reason, loud.detail) == (EndReason.EXIT_CODE, "no weights")


TRACEBACK = ["Traceback (most recent call last):", '  File "train.py", line 9, in <module>', "    train()"]


class TestClassify:
    @pytest.mark.parametrize(
        ("lines", "exit_record", "reason", "params"),
        [
            (
                [*TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."],
                ended(code=1),
                EndReason.CUDA_OUT_OF_MEMORY,
                {},
            ),
            (
                [*TRACEBACK, "RuntimeError: CUDA error: out of memory"],
                ended(code=1),
                EndReason.CUDA_OUT_OF_MEMORY,
                {},
            ),
            (
                [*TRACEBACK, "ModuleNotFoundError: No module named 'peft.tuners'"],
                ended(code=1),
                EndReason.MODULE_MISSING,
                {"module": "peft"},
            ),
            (
                [*TRACEBACK, "ImportError: 4-bit needs bitsandbytes: `pip install -U bitsandbytes>=0.46`"],
                ended(code=1),
                EndReason.MODULE_MISSING,
                {"module": "bitsandbytes"},
            ),
            (
                [*TRACEBACK, "ValueError: Column name ['prompt'] not in the dataset. Current columns: ['a']"],
                ended(code=1),
                EndReason.COLUMN_MISSING,
                {"column": "prompt"},
            ),
            (
                [*TRACEBACK, "ValueError: Column 'prompt' doesn't exist."],
                ended(code=1),
                EndReason.COLUMN_MISSING,
                {"column": "prompt"},
            ),
            (
                [*TRACEBACK, "ValueError: data.jsonl, line 7: column 'answer' is missing; there are: a, b"],
                ended(code=1),
                EndReason.COLUMN_MISSING,
                {"column": "answer"},
            ),
            (
                [*TRACEBACK, '    return example["prompt"]', "KeyError: 'prompt'"],
                ended(code=1),
                EndReason.COLUMN_MISSING,
                {"column": "prompt"},
            ),
            ([*TRACEBACK, "KeyError: 'lora'"], ended(code=1), EndReason.EXIT_CODE, {"exit_code": 1}),
            (
                [*TRACEBACK, "OSError: [Errno 28] No space left on device: 'model.safetensors'"],
                ended(code=1),
                EndReason.DISK_FULL,
                {},
            ),
            (["step 4"], ended(code=None, signal=9, oom_kills=1), EndReason.OUT_OF_MEMORY, {"probable": False}),
            (["step 4"], ended(code=None, signal=9, oom_kills=None), EndReason.OUT_OF_MEMORY, {"probable": True}),
            (["step 4"], ended(code=None, signal=9, oom_kills=0), EndReason.SIGNAL, {"signal": "SIGKILL"}),
            (["step 4"], ended(code=137, oom_kills=None), EndReason.OUT_OF_MEMORY, {"probable": True}),
            ([*TRACEBACK, "MemoryError"], ended(code=1), EndReason.OUT_OF_MEMORY, {"probable": False}),
            (["Segmentation fault"], ended(code=None, signal=11), EndReason.SIGNAL, {"signal": "SIGSEGV"}),
            (["x"], ended(code=None, signal=64), EndReason.SIGNAL, {}),
            (
                [*TRACEBACK, "ValueError: other"],
                ended(code=1, oom_kills=2),
                EndReason.EXIT_CODE,
                {"detail": "ValueError: other"},
            ),
            (
                ["x"],
                ended(why="stopped", code=None, signal=15, stop_reason="supervisor_terminated"),
                EndReason.SIGNAL,
                {},
            ),
            (
                [],
                ended(why="spawn_failed", code=None, error="No such file: python"),
                EndReason.SPAWN_FAILED,
                {"detail": "No such file: python"},
            ),
            ([], ended(code=2), EndReason.EXIT_CODE, {"exit_code": 2, "detail": "(no output)"}),
            (
                ["No module named 'triton': slower", *["step"] * 9],
                ended(code=None, signal=11),
                EndReason.SIGNAL,
                {"signal": "SIGSEGV"},
            ),
            (["python: No module named trl"], ended(code=1), EndReason.MODULE_MISSING, {"module": "trl"}),
            (
                ['{"status": "error", "message": "no template"}', "bye"],
                ended(code=1),
                EndReason.EXIT_CODE,
                {"detail": "no template"},
            ),
        ],
    )
    def test_names_the_reason(
        self, lines: list[str], exit_record: ExitRecord, reason: EndReason, params: dict[str, Any]
    ) -> None:
        failure = classify(exit_record, lines)

        assert failure.reason is reason
        assert params.items() <= failure.params.items()

    def test_an_error_that_was_survived_is_not_the_cause(self) -> None:
        lines = ["CUDA out of memory, trying a smaller batch", *TRACEBACK, "ValueError: learning rate is negative"]

        failure = classify(ended(code=1), lines)

        assert (failure.reason, failure.detail) == (EndReason.EXIT_CODE, "ValueError: learning rate is negative")

    @pytest.mark.parametrize(
        ("lines", "reason", "detail"),
        [
            # a survived import, and much later another end
            (
                [*TRACEBACK, "ModuleNotFoundError: No module named 'x'", *["step"] * 60, "Stopped: loss became NaN"],
                EndReason.EXIT_CODE,
                "Stopped: loss became NaN",
            ),
            # the same with hardly a word between
            (
                [*TRACEBACK, "ModuleNotFoundError: No module named 'x'", "Stopped: loss became NaN"],
                EndReason.EXIT_CODE,
                "Stopped: loss became NaN",
            ),
            (
                ["going on: No module named 'x'", "there are no rows"],
                EndReason.EXIT_CODE,
                "there are no rows",
            ),
            (
                [*TRACEBACK, "RuntimeError: CUDA out of memory", "trying 2", "{'loss': 2.0, 'epoch': 0.1}", "no space"],
                EndReason.EXIT_CODE,
                "no space",
            ),
            # what stands behind every failure
            (["step", "[ERR] ValueError: bad rate", "return_code:1"], EndReason.EXIT_CODE, "ValueError: bad rate"),
            (
                [*(f"[ERR] {line}" for line in TRACEBACK), "[ERR] MemoryError", "[OUT] step 4", "exit code: 1"],
                EndReason.OUT_OF_MEMORY,
                "MemoryError",
            ),
            (
                [*(f"[ERR] {line}" for line in TRACEBACK), "[ERR] MemoryError", "return_code:1"],
                EndReason.OUT_OF_MEMORY,
                "MemoryError",
            ),
            (
                [*TRACEBACK, "ModuleNotFoundError: No module named 'x'", " 10%|█   | 1/10 [00:01<00:09, 1.0s/it]"],
                EndReason.MODULE_MISSING,
                "ModuleNotFoundError: No module named 'x'",
            ),
            (
                [
                    *TRACEBACK,
                    "MemoryError",
                    "Exception ignored in: <function A.__del__ at 0x7f>",
                    *TRACEBACK,
                    "KeyError: 1",
                ],
                EndReason.OUT_OF_MEMORY,
                "MemoryError",
            ),
            # a message of several lines
            (
                [
                    *TRACEBACK,
                    "RuntimeError: CUDA error: device-side assert triggered",
                    "CUDA kernel errors might be asynchronously reported at some other API call.",
                    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1",
                ],
                EndReason.EXIT_CODE,
                "RuntimeError: CUDA error: device-side assert triggered",
            ),
            (
                [*TRACEBACK, "OSError: x is no folder", "", "If this is a private repository, log in"],
                EndReason.EXIT_CODE,
                "OSError: x is no folder … If this is a private repository, log in",
            ),
        ],
    )
    def test_the_last_thing_that_happened_is_the_cause(self, lines: list[str], reason: EndReason, detail: str) -> None:
        failure = classify(ended(code=1), lines)

        assert (failure.reason, failure.detail) == (reason, detail)

    @settings(deadline=None)
    @given(
        lines=st.lists(
            st.sampled_from(
                [*TRACEBACK, "ValueError: x", "[ERR] ValueError: x", "return_code:1", "[rank1]: KeyError: 1"]
            )
            | st.text(max_size=30),
            max_size=40,
        )
    )
    def test_any_output_has_a_reason(self, lines: list[str]) -> None:
        failure = classify(ended(code=1), lines)

        assert failure.detail
        assert len(failure.detail) <= 500

    def test_long_lines_are_quick(self) -> None:
        begun = time.thread_time()
        for unit in ("1", "a", "[rank1]: ", "[ERR] ", "A.", "Error", "loss/", "'", "-" * 9, "No module named '"):
            classify(
                ended(code=1), [(unit * 300_000)[:300_000], *TRACEBACK, "ValueError: x", (unit * 300_000)[:300_000]]
            )

        assert time.thread_time() - begun < 10.0

    def test_looks_behind_a_chain_and_behind_the_launchers_summary(self) -> None:
        chained = [
            *TRACEBACK,
            "ModuleNotFoundError: No module named 'flash_attn'",
            "",
            "The above exception was the direct cause of the following exception:",
            "",
            *TRACEBACK,
            "RuntimeError: Failed to import transformers",
        ]
        launched = [
            *(f"[rank0]: {line}" for line in TRACEBACK),
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory.",
            *TRACEBACK,
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
            "============",
        ]

        assert classify(ended(code=1), chained).params["module"] == "flash_attn"
        assert classify(ended(code=1), launched).reason is EndReason.CUDA_OUT_OF_MEMORY

    @pytest.mark.parametrize(
        "record",
        [
            {"msg": 200006, "msgDetail": "CUDA out of memory.", "taskUuid": "t", "details": None},
            {"msg": 200006, "msgDetail": "t", "taskUuid": "CUDA out of memory.", "details": 0},
        ],
    )
    def test_reads_the_scripts_own_failure_record(self, record: dict[str, Any]) -> None:
        lines = ["[log_data]: " + json.dumps(record), "bye"]

        failure = classify(ended(code=1), lines)

        assert (failure.reason, failure.detail) == (EndReason.CUDA_OUT_OF_MEMORY, "CUDA out of memory.")

    def test_last_words_are_what_a_person_would_read(self) -> None:
        assert last_words(["a", " 10%\r 20%", "  the end  ", "", '[log_data]: {"msg": 1}']) == "the end"
        assert len(last_words(["x" * 10_000])) == 500


class TestArtifacts:
    def test_knows_the_shapes_of_customized_models(self, tmp_path: Path) -> None:
        image, mlx = tmp_path / "image", tmp_path / "mlx"
        for folder, name in ((image, "pytorch_lora_weights.safetensors"), (mlx, "adapters.safetensors")):
            folder.mkdir()
            (folder / name).write_bytes(safetensors({"a": 1}))

        assert check_customized(write_adapter(tmp_path / "peft")).kind is ArtifactKind.ADAPTER
        assert check_customized(image).kind is ArtifactKind.IMAGE_ADAPTER
        assert check_customized(mlx).kind is ArtifactKind.MLX_ADAPTER
        assert check_customized(write_sharded(tmp_path / "full")).kind is ArtifactKind.MODEL

    def test_finds_the_complete_model_that_a_training_saved_beside_its_adapter(self, tmp_path: Path) -> None:
        write_adapter(tmp_path)
        write_sharded(tmp_path / "saved")

        assert check_complete(tmp_path).root == tmp_path / "saved"
        assert check_customized(tmp_path).root == tmp_path

    def test_a_training_that_saves_beside_its_adapter_makes_both(self, tmp_path: Path) -> None:
        write_adapter(tmp_path / "out")
        write_sharded(tmp_path / "out" / "saved")

        verdict = judge(JobKind.TRAINING, ended(), log_tail=[], script_status=None, output_dir=tmp_path / "out")

        assert verdict.artifact is not None
        assert verdict.saved is not None
        assert (verdict.artifact.root, verdict.saved.root) == (tmp_path / "out", tmp_path / "out" / "saved")
        (tmp_path / "out" / "saved" / "model-00002-of-00002.safetensors").unlink()
        half = judge(JobKind.TRAINING, ended(), log_tail=[], script_status=None, output_dir=tmp_path / "out")
        assert (half.succeeded, half.saved) == (True, None)

    def test_a_model_lies_where_the_method_says(self, tmp_path: Path) -> None:
        for name in ("checkpoint-9", "checkpoint-10", "run/final"):
            write_adapter(tmp_path / name)

        assert find_model(tmp_path, "run/final", complete=False).root == tmp_path / "run" / "final"
        assert find_model(tmp_path, "checkpoint-*", complete=False).root == tmp_path / "checkpoint-10"
        with pytest.raises(ArtifactProblem, match="“other-\\*” names no folder"):
            find_model(tmp_path, "other-*", complete=False)

    @pytest.mark.parametrize(("place", "cure"), [("a/final", "a/final"), ("checkpoint-7", "checkpoint-*")])
    def test_a_model_that_lies_elsewhere_is_named_with_the_cure(self, tmp_path: Path, place: str, cure: str) -> None:
        write_adapter(tmp_path / place)

        with pytest.raises(ArtifactProblem, match=re.escape(f"A model lies in {place}.")) as caught:
            find_model(tmp_path, None, complete=False)

        assert f"output = “{cure}”" in caught.value.detail
        with pytest.raises(ArtifactProblem) as caught:
            find_model(tmp_path, None, complete=True)
        assert "lies in" not in caught.value.detail

    def test_an_adapter_is_no_complete_model(self, tmp_path: Path) -> None:
        (write_adapter(tmp_path) / "config.json").write_text("{}")

        with pytest.raises(ArtifactProblem) as caught:
            check_complete(tmp_path)

        assert caught.value.reason is EndReason.OUTPUT_MISSING

    @pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
    @pytest.mark.parametrize("with_index", [True, False])
    def test_misses_a_shard_or_the_config(self, tmp_path: Path, name: str, with_index: bool) -> None:
        write_sharded(tmp_path)
        (tmp_path / name).unlink()
        if not with_index:
            (tmp_path / "model.safetensors.index.json").unlink()

        with pytest.raises(ArtifactProblem, match=name) as caught:
            check_complete(tmp_path)

        assert caught.value.reason is EndReason.OUTPUT_MISSING

    def test_misses_a_tensor_of_the_index(self, tmp_path: Path) -> None:
        write_sharded(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(safetensors({"other": 4}))

        with pytest.raises(ArtifactProblem, match="such as b"):
            check_complete(tmp_path)

    def test_checks_the_parts_of_a_pipeline(self, tmp_path: Path) -> None:
        index = {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": [None, None]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ArtifactProblem, match="unet"):
            check_complete(tmp_path)
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(safetensors({"a": 1}))

        assert check_complete(tmp_path).kind is ArtifactKind.PIPELINE

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x00" * 7,
            (1 << 60).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            safetensors({"a": 8}, missing_bytes=1),
            safetensors({"a": 8}) + b"x",
            safetensors({"a": 8})[:20],
            safetensors({"a": 8}).replace(b"[8]", b"[9]"),
            safetensors({"a": 8}).replace(b"[0, 8]", b"[1, 9]"),
            safetensors({"a": 8}).replace(b'"U8"', b"8888"),
        ],
    )
    def test_refuses_weights_whose_header_and_size_do_not_fit(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)

        with pytest.raises(ArtifactProblem) as caught:
            check_safetensors(path)

        assert caught.value.reason is EndReason.OUTPUT_INVALID

    async def test_the_manifest_lists_the_bytes_of_the_model_and_reads_back(self, tmp_path: Path) -> None:
        write_adapter(tmp_path / "output")
        (tmp_path / "output" / "checkpoint-5").mkdir()
        (tmp_path / "output" / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
        files = await digest_files(tmp_path / "output")
        manifest = ResultManifest(
            job_id="j",
            attempt=1,
            stage=JobKind.TRAINING,
            kind=ArtifactKind.ADAPTER,
            root="output",
            files=files,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )

        write_result(tmp_path / "result.json", manifest)

        assert [file.path for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
        contents = [(tmp_path / "output" / file.path).read_bytes() for file in files]
        assert [file.sha256 for file in files] == [hashlib.sha256(content).hexdigest() for content in contents]
        assert read_result(tmp_path / "result.json") == manifest
        assert manifest.size_bytes == sum(file.stat().st_size for file in (tmp_path / "output").glob("*.*"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "result.json"]
        assert read_result(tmp_path / "none.json") is None

    async def test_digests_a_file_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artifacts, "_PIECE_BYTES", 1000)
        monkeypatch.setattr(artifacts, "_BLOCK_BYTES", 300)
        content = bytes(range(256)) * 40
        (tmp_path / "weights").write_bytes(content)

        (file,) = await digest_files(tmp_path)

        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


class TestReasonTexts:
    @pytest.mark.parametrize("reason", EndReason)
    def test_every_reason_has_a_text_in_every_language(self, reason: EndReason) -> None:
        entry = catalogue()[f"reason_{reason}"]

        assert set(entry) == set(Language)
        for language in Language:
            params = {"detail": "D", "exit_code": 3, "signal": "SIGSEGV", "module": "peft", "column": "prompt"}
            params |= {"code": "C", "environment": "trl"}
            params |= {
                "limit_seconds": 60,
                "secrets": "hub",
                "base_model": "tiny-base",
                "build": "J",
                "path": "P",
                "file": "F",
            }
            assert "{" not in text(f"reason_{reason}", language, **params)
