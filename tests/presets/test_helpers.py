"""The helper modules as stage scripts meet them: imported from the script root, in an empty environment."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets.stage import Finished, Home

METRIC_KEYS = [
    "step",
    "reward",
    "reward_std",
    "kl",
    "loss",
    "train_loss",
    "validation_loss",
    "bleu",
    "rouge",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "epoch",
]

TRAINER = """
from types import SimpleNamespace
from train_callback import TrainCallback
callback = TrainCallback(1, "job-1", 1)
state = SimpleNamespace(global_step=3, max_steps=12, log_history=[], is_world_process_zero=True)
def log(**logs):
    state.log_history.append({**logs, "step": state.global_step})
    callback.on_log(None, state, None, logs=logs)
"""


def run(home: Home, code: str, **variables: str) -> Finished:
    (home.scripts / "probe.py").write_text(code)
    finished = home.run("probe.py", environment=variables)
    assert finished.code == 0, finished.stderr
    return finished


def log_file(home: Home) -> Path:
    return home.path / "logs" / f"{datetime.now().astimezone():%Y-%m-%d}-deep-e-python.jsonl"


class TestWriteLog:
    def test_writes_the_same_record_to_stdout_and_to_the_file_of_the_day(self, home: Home) -> None:
        code = (
            "from train_callback import write_log, LevelEnum, LogEnum\n"
            "write_log(LevelEnum.WARNING, LogEnum.ActualParams, 'größe', 'job-1', 2, {'a': [1, None]})"
        )

        finished = run(home, code)

        line = finished.stdout.removeprefix("[log_data]: ")
        assert re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", line) == (
            '{"level": "warning", "time": "<time>", "taskUuid": "job-1", "seq": 2, "msgDetail": "gr\\u00f6\\u00dfe", '
            '"msg": 140001, "details": {"a": [1, null]}}\n'
        )
        assert log_file(home).read_text() == line

    def test_failing_write_is_said_and_not_raised(self, home: Home) -> None:
        shutil.rmtree(home.path / "logs")

        finished = run(
            home,
            "from train_callback import *\nwrite_log(LevelEnum.INFO, LogEnum.StartTraining, '', 'j', 1, None)",
        )

        assert finished.stdout.splitlines()[1].startswith("Write Error: ")

    def test_nan_and_infinity_become_null(self, home: Home) -> None:
        finished = run(
            home,
            "from train_callback import *\n"
            "write_log(LevelEnum.INFO, LogEnum.StartTraining, '', 'j', 1, {'a': float('nan'), 'b': [float('inf')]})",
        )

        assert finished.records[0]["details"] == {"a": None, "b": [None]}

    def test_all_six_arguments_are_required(self, home: Home) -> None:
        finished = run(
            home,
            "import inspect, train_callback\n"
            "for p in inspect.signature(train_callback.write_log).parameters.values():\n"
            "    print(p.name, p.default is p.empty)",
        )

        names = ["level", "logEnum", "details", "train_id", "seq", "external_data"]
        assert finished.stdout.splitlines() == [f"{name} True" for name in names]

    def test_metrics_of_a_script_reach_the_curves(self, home: Home) -> None:
        finished = run(
            home,
            "from train_callback import *\n"
            "write_log(LevelEnum.INFO, LogEnum.Training, '25.0', 'j', 1, {'step': 3, 'loss': 0.5, 'kl': None})",
        )

        (event,) = finished.of_type("metrics")
        assert (event["step"], event["values"]) == (3, {"loss": 0.5})


class TestTrainCallback:
    def test_reports_the_values_of_the_step_that_was_logged(self, home: Home) -> None:
        finished = run(home, TRAINER + "log(loss=1.5, grad_norm=float('nan'), eval_loss=2.0, extra=7)")

        (record,) = finished.records
        assert (record["msg"], record["msgDetail"], record["level"]) == (200009, "25.0", "info")
        assert list(record["details"]) == METRIC_KEYS
        filled = {key: value for key, value in record["details"].items() if value is not None}
        assert filled == {"step": 3, "loss": 1.5, "validation_loss": 2.0}
        assert finished.of_type("metrics")[0]["values"] == {
            "loss": 1.5,
            "grad_norm": None,
            "eval_loss": 2.0,
            "extra": 7,
        }
        assert (finished.of_type("progress")[0]["step"], finished.of_type("progress")[0]["total"]) == (3, 12)

    def test_step_end_says_nothing_without_history_and_nothing_twice(self, home: Home) -> None:
        code = "callback.on_step_end(None, state, None)\nlog(loss=1.0)\ncallback.on_step_end(None, state, None)"

        finished = run(home, TRAINER + code)

        assert len(finished.records) == 1

    def test_step_end_reports_the_newest_entry_where_no_log_hook_ran(self, home: Home) -> None:
        code = "state.log_history.append({'loss': 2.5, 'step': 3})\ncallback.on_step_end(None, state, None)"

        finished = run(home, TRAINER + code)

        assert finished.records[0]["details"]["loss"] == 2.5

    def test_keeps_the_attributes_scripts_use(self, home: Home) -> None:
        finished = run(
            home,
            TRAINER + "log(loss=1.0)\nprint(callback.taskUuid, callback.seq, callback.logging_steps, "
            "len(callback.metrics), callback.sse_queue.get()['loss'])",
        )

        assert finished.stdout.splitlines()[-1] == "job-1 1 1 1 1.0"

    def test_mlx_reports_become_metrics(self, home: Home) -> None:
        code = (
            "callback.on_train_loss_report({'iteration': 5, 'train_loss': 0.5, 'learning_rate': 0.1})\n"
            "callback.on_val_loss_report({'iteration': 5, 'val_loss': 0.6})"
        )

        finished = run(home, TRAINER + code)

        first, second = (record["details"] for record in finished.records)
        assert (first["step"], first["loss"], second["validation_loss"]) == (5, 0.5, 0.6)


class TestRedisUtil:
    @pytest.mark.parametrize(
        "variables", [{}, {"AI_PY_REDIS_HOST": "127.0.0.1", "AI_PY_REDIS_START_PORT": "1"}], ids=["unset", "no server"]
    )
    def test_does_nothing_without_a_server(self, home: Home, variables: dict[str, str]) -> None:
        code = (
            "from redis_util import redis_client, RedisClient\n"
            "redis_client.set_status('job-1', 3)\nprint(redis_client.get_status('job-1'))\n"
            "redis_client.delete_status('job-1')\nprint(hasattr(RedisClient(), 'client'))"
        )

        finished = run(home, code, **variables)

        assert finished.stdout.split() == ["None", "True"]

    def test_is_inert_without_the_package(self, home: Home) -> None:
        code = (
            "import sys\nsys.modules['redis'] = None\n"
            "from redis_util import redis_client\nredis_client.set_status('job-1', 3)\nprint(redis_client.client)"
        )

        finished = run(home, code, AI_PY_REDIS_HOST="127.0.0.1", AI_PY_REDIS_START_PORT="1")

        assert finished.stdout.split() == ["None"]
        assert [(event["type"], event["task"], event["status"]) for event in finished.events] == [
            ("status", "job-1", 3)
        ]


class TestDeepe:
    def test_events_have_the_agreed_shape(self, home: Home) -> None:
        code = (
            "import deepe\n"
            "deepe.metrics(step=2, loss=float('nan'), rate=0.5)\n"
            "deepe.progress(2, 10)\n"
            "deepe.artifact('out/checkpoint-2', kind='checkpoint')\n"
            "deepe.evaluation('before', 0.25, 8)\n"
            "deepe.note('hello')"
        )

        finished = run(home, code)

        assert all(isinstance(event.pop("time"), float) for event in finished.events)
        assert finished.events == [
            {"type": "metrics", "step": 2, "values": {"loss": None, "rate": 0.5}},
            {"type": "progress", "step": 2, "total": 10, "message": None},
            {"type": "artifact", "path": "out/checkpoint-2", "kind": "checkpoint"},
            {"type": "evaluation", "name": "exact_match", "phase": "before", "value": 0.25, "samples": 8},
            {"type": "note", "message": "hello"},
        ]

    def test_does_nothing_when_run_by_hand(self, home: Home) -> None:
        finished = run(home, "import deepe\ndeepe.note('x')\nprint(deepe.params())", DEEPE_EVENTS="")

        assert finished.stdout == "{}\n"
        assert finished.events == []

    def test_full_disk_does_not_end_the_script(self, home: Home) -> None:
        finished = run(home, "import deepe\ndeepe.note('x')\nprint('alive')", DEEPE_EVENTS="/dev/full")

        assert finished.stdout == "alive\n"
        assert "cannot write an event" in finished.stderr

    def test_params_and_output_folder_come_from_the_platform(self, home: Home) -> None:
        (home.path / "params.json").write_text(json.dumps({"epochs": 2}))
        variables = {"DEEPE_PARAMS": str(home.path / "params.json"), "DEEPE_OUTPUT_DIR": str(home.path / "made")}

        finished = run(home, "import deepe\nprint(deepe.params(), deepe.output_dir())", **variables)

        assert finished.stdout == f"{{'epochs': 2}} {home.path / 'made'}\n"
        assert (home.path / "made").is_dir()

    def test_result_is_one_json_line(self, home: Home) -> None:
        finished = run(home, "import deepe\nprint('noise')\ndeepe.result(message='done')")

        assert finished.json_lines == [{"status": "success", "message": "done"}]

    def test_stop_is_a_flag_only_for_scripts_that_ask_for_it(self, home: Home) -> None:
        (home.scripts / "probe.py").write_text("import train_callback, os\nos.kill(os.getpid(), 15)\nprint('alive')")
        ended = home.run("probe.py")

        flagged = run(
            home, "import deepe, os\ndeepe.catch_stop()\nos.kill(os.getpid(), 15)\nprint(deepe.stop_requested())"
        )

        assert ended.code == -15
        assert flagged.stdout == "True\n"


class TestOwnCopy:
    @pytest.mark.parametrize("module", ["enums", "train_callback", "redis_util"])
    def test_a_users_own_module_in_the_script_root_wins(self, home: Home, module: str) -> None:
        (home.scripts / f"{module}.py").write_text("mine = True\n")

        finished = run(home, f"import {module}\nprint({module}.mine)")

        assert finished.stdout == "True\n"


class TestEnums:
    def test_codes(self) -> None:
        names: dict[str, Any] = {}
        exec((catalogue.helpers_dir() / "enums.py").read_text(), names)

        assert {status.name: status.value for status in names["StatusEnum"]} == {
            "PleaseCheck": 0,
            "Success": 1,
            "Running": 2,
            "Failed": 3,
            "Warning": 4,
            "Unknown": 5,
        }
        assert [level.value for level in names["LevelEnum"]] == [0, 1, 2]
        codes = [code.value for code in names["LogEnum"]]
        assert len(codes) == len(set(codes)) == 5 + 2 + 1 + 9 + 10 + 29


class TestGroupOfProcesses:
    CODE = (
        "import deepe\n"
        "from train_callback import write_log, LevelEnum, LogEnum\n"
        "deepe.metrics(1, loss=1.0)\n"
        "deepe.artifact('x')\n"
        "write_log(LevelEnum.ERROR, LogEnum.TrainingFailed, 'no rows', 'job-1', 1, None)\n"
    )

    def test_rank_0_speaks_for_all(self, home: Home) -> None:
        finished = run(home, self.CODE, RANK="0", WORLD_SIZE="2")

        assert [event["type"] for event in finished.events] == ["metrics", "artifact"]
        assert len(log_file(home).read_text().splitlines()) == 1

    def test_others_only_print(self, home: Home) -> None:
        finished = run(home, self.CODE, RANK="1", WORLD_SIZE="2")

        assert finished.events == []
        assert [record["msgDetail"] for record in finished.records] == ["no rows"]
        assert not log_file(home).exists()


class TestLoading:
    """What of a model's author runs when a script loads the model, by what the job permits."""

    PROBE = """
import json
from pathlib import Path
import deepe_loading as loading
from deepe_rows import Refused
def tried(load):
    try:
        return load("model")
    except Refused as refused:
        return str(refused)
print(json.dumps([tried(loading.weights), tried(loading.code)]))
"""

    def loads(self, home: Home, permits: str | None) -> list[Any]:
        finished = run(home, self.PROBE, **({} if permits is None else {"DEEPE_LOADING_PERMITS": permits}))
        found: list[Any] = json.loads(finished.stdout)
        return found

    def test_refuses_what_the_job_does_not_permit(self, home: Home) -> None:
        folder = home.scripts / "model"
        folder.mkdir()
        (folder / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
        (folder / "pytorch_model.bin").write_bytes(b"\x80")

        weights, code = self.loads(home, "")
        assert "--pickled-weights" in weights
        assert "--custom-code" in code
        weights, code = self.loads(home, "pickled_weights")
        assert "--custom-code" in weights
        assert self.loads(home, "pickled_weights,custom_code") == [{"trust_remote_code": True}] * 2
        assert self.loads(home, None) == [{}, {}]

        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
        assert self.loads(home, "") == [
            {"use_safetensors": True, "trust_remote_code": False}, {"trust_remote_code": False},
        ]  # fmt: skip
