"""The commands that start a stage, and what is read from the output of a group of processes."""

import json
from pathlib import Path

import pytest

from app.domain.enums import EndReason
from app.domain.launchers import Launcher, LauncherKind
from app.executor.attempts.classification import Failure, classify
from app.executor.attempts.launchers import group_variables, stage_command
from app.executor.attempts.log_projection import LogProjector
from app.executor.supervisor.client import ExitRecord, ExitWhy

TRACEBACK = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "    f()"]
LOST_PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:58031"


def command(kind: LauncherKind, processes: int, config: Path | None = None) -> list[str]:
    return list(
        stage_command(
            Launcher(kind=kind),
            python=Path("/envs/trl/bin/python"),
            target=["/scripts/train.py"],
            arguments=["--output_dir=../out"],
            processes=processes,
            ranks=Path("/runs/j/1/ranks"),
            config=config,
        )
    )


class TestCommand:
    def test_python_starts_the_file_itself(self) -> None:
        assert command(LauncherKind.PYTHON, 1) == [
            "/envs/trl/bin/python", "-u", "/scripts/train.py", "--output_dir=../out"
        ]  # fmt: skip

    def test_torchrun_starts_a_group_on_the_loopback_and_never_again(self) -> None:
        assert command(LauncherKind.TORCHRUN, 3) == [
            "/envs/trl/bin/python", "-u", "-I", "-m", "torch.distributed.run",
            "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=3", "--max-restarts=0",
            "--log-dir=/runs/j/1/ranks", "--tee=1:3,2:3",
            "/scripts/train.py", "--output_dir=../out",
        ]  # fmt: skip

    def test_accelerate_does_the_same(self) -> None:
        argv = command(LauncherKind.ACCELERATE, 2)

        assert argv[:5] == ["/envs/trl/bin/python", "-u", "-I", "-m", "accelerate.commands.launch"]
        assert {"--num_processes=2", "--multi_gpu", "--main_process_port=0", "--max_restarts=0"} <= set(argv)
        assert argv[-3:] == ["--tee=1:3", "/scripts/train.py", "--output_dir=../out"]

    def test_a_configuration_starts_a_group_whatever_the_launcher(self) -> None:
        for kind in LauncherKind:
            assert command(kind, 2, config=Path("/runs/j/1/accelerate.yaml")) == [
                "/envs/trl/bin/python", "-u", "-I", "-m", "accelerate.commands.launch",
                "--config_file=/runs/j/1/accelerate.yaml", "--main_process_port=0", "--max_restarts=0",
                "--log_dir=/runs/j/1/ranks", "--tee=1:3",
                "/scripts/train.py", "--output_dir=../out",
            ]  # fmt: skip

    @pytest.mark.parametrize("kind", [LauncherKind.TORCHRUN, LauncherKind.ACCELERATE])
    def test_a_group_of_one_writes_to_the_output_only(self, kind: LauncherKind) -> None:
        assert not any(word.startswith(("--tee", "--multi_gpu")) for word in command(kind, 1))


class TestVariables:
    def test_processes_share_the_cores(self) -> None:
        assert group_variables({}, processes=4, grace_seconds=10.5, cores=16)["OMP_NUM_THREADS"] == "4"
        assert group_variables({}, processes=4, grace_seconds=10.5, cores=2)["OMP_NUM_THREADS"] == "1"

    def test_what_the_operator_has_set_stays(self) -> None:
        given = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "ib0"}

        assert given.keys().isdisjoint(group_variables(given, processes=2, grace_seconds=1, cores=8))

    def test_a_stop_leaves_every_process_the_whole_grace(self) -> None:
        added = group_variables({}, processes=2, grace_seconds=120.2, cores=8)

        assert added["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "121"


def failed_group(*, first: int, exitcode: str = "1 (pid: 7)", ended_by: str = "To enable traceback see") -> list[str]:
    """Return the launcher's last lines."""
    return [
        "E1125 16:20:27.365000 14069 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)",
        *TRACEBACK,
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "============================================================",
        "train.py FAILED",
        "Failures:",
        "[1]:",
        f"  rank      : {1 - first} (local_rank: {1 - first})",
        "  exitcode  : -15 (pid: 8)  (SIGTERM)",
        "  traceback : Signal 15 (SIGTERM) received by PID 8",
        "Root Cause (first observed failure):",
        "[0]:",
        f"  rank      : {first} (local_rank: {first})",
        f"  exitcode  : {exitcode}",
        "  error_file: <N/A>",
        f"  traceback : {ended_by}",
        "============================================================",
    ]


def cause(*lines: str, oom_kills: int | None = 0) -> Failure:
    record = ExitRecord(
        attempt_id="a", why=ExitWhy.EXITED, code=1, signal=None, error=None, stop_reason=None, oom_kills=oom_kills,
        leftovers=0, unkillable=0, max_rss_bytes=1, user_seconds=1.0, system_seconds=1.0, started_at=1.0,
        finished_at=2.0,
    )  # fmt: skip
    return classify(record, lines)


def of_rank(rank: int, *lines: str) -> list[str]:
    """Return lines as they stand in the output: torch marks those of an exception, the launcher all but rank 0's."""
    return [f"[rank{rank}]: {f'[rank{rank}]: ' if rank else ''}{line}" for line in lines]


class TestFailure:
    def test_is_that_of_the_process_that_failed_first(self) -> None:
        found = cause(
            "step 3",
            *of_rank(1, *TRACEBACK, "ValueError: bad row"),
            *of_rank(0, *TRACEBACK, LOST_PEER),
            *failed_group(first=1),
        )

        assert (found.reason, found.detail) == (EndReason.EXIT_CODE, "ValueError: bad row")

    def test_is_the_cause_even_if_its_victim_was_seen_first(self) -> None:
        found = cause(
            *of_rank(0, *TRACEBACK, LOST_PEER),
            *of_rank(1, *TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory."),
            *failed_group(first=0),
        )

        assert found.reason is EndReason.CUDA_OUT_OF_MEMORY

    def test_lines_of_two_processes_in_one_another_do_not_hide_it(self) -> None:
        ones, others = of_rank(1, *TRACEBACK, "ValueError: one"), of_rank(0, *TRACEBACK, "KeyError: 'zero'")
        mixed = [line for pair in zip(ones, others, strict=True) for line in pair]

        assert cause(*mixed, *failed_group(first=1)).detail == "ValueError: one"
        assert cause(*mixed, *failed_group(first=0)).detail == "KeyError: 'zero'"

    def test_of_rank_0_needs_no_mark(self) -> None:
        found = cause("loading", *TRACEBACK, "ModuleNotFoundError: No module named 'peft'", *failed_group(first=0))

        assert (found.reason, found.params["module"]) == (EndReason.MODULE_MISSING, "peft")

    def test_names_the_signal_that_ended_a_process(self) -> None:
        end = {"exitcode": "-11 (pid: 7)  (SIGSEGV)", "ended_by": "Signal 11 (SIGSEGV) received by PID 7"}

        found = cause("step 3", *of_rank(0, *TRACEBACK, LOST_PEER), *failed_group(first=1, **end))

        assert (found.reason, found.params["signal"]) == (EndReason.SIGNAL, "SIGSEGV")
        assert found.detail == "rank 1: Signal 11 (SIGSEGV) received by PID 7"

    @pytest.mark.parametrize(
        ("oom_kills", "reason"),
        [(0, EndReason.SIGNAL), (1, EndReason.OUT_OF_MEMORY), (None, EndReason.OUT_OF_MEMORY)],
    )
    def test_killed_process_ran_out_of_memory_unless_the_kernel_says_no(
        self, oom_kills: int | None, reason: EndReason
    ) -> None:
        end = {"exitcode": "-9 (pid: 7)  (SIGKILL)", "ended_by": "Signal 9 (SIGKILL) received by PID 7"}

        found = cause("step 3", *failed_group(first=1, **end), oom_kills=oom_kills)

        assert (found.reason, found.params["signal"]) == (reason, "SIGKILL")

    def test_what_it_said_last_is_shown_if_it_raised_nothing(self) -> None:
        found = cause("[rank1]: train.py: there are no rows", *failed_group(first=1))

        assert found.detail == "train.py: there are no rows"

    def test_silent_process_still_has_an_end(self) -> None:
        assert cause("step 3", *failed_group(first=1)).detail == "rank 1: exit code 1 (pid: 7)"

    @pytest.mark.parametrize("module", ["torch.distributed.run", "accelerate.commands.launch"])
    def test_environment_without_the_launcher_lacks_a_module(self, module: str) -> None:
        package = module.partition(".")[0]
        line = f"/envs/x/bin/python: Error while finding module specification for '{module}' "

        found = cause(f"{line}(ModuleNotFoundError: No module named '{package}')")

        assert (found.reason, found.params["module"]) == (EndReason.MODULE_MISSING, package)


def record(code: int, step: int) -> str:
    document = {"level": "info", "time": "2025-01-01T00:00:00Z", "taskUuid": "t", "seq": 1, "msgDetail": "50.0"}
    return "[log_data]: " + json.dumps(document | {"msg": code, "details": {"step": step, "loss": 1.0}})


class TestRecords:
    def test_curves_come_from_rank_0_and_failures_from_all(self, tmp_path: Path) -> None:
        output, events = tmp_path / "output.log", tmp_path / "events.jsonl"
        lines = [record(200009, 1), f"[rank1]: {record(200009, 1)}", f"[rank12]: {record(200006, 1)}"]
        output.write_text("\n".join([*lines, record(200009, 2), ""]))

        LogProjector(output, events, clock=lambda: 0.0).advance()

        found = [json.loads(line) for line in events.read_text().splitlines()]
        assert [event["step"] for event in found if event["type"] == "metrics"] == [1, 2]
        assert [event["code"] for event in found if event["type"] == "record"] == [200006]

    def test_however_the_output_arrives(self, tmp_path: Path) -> None:
        text = f"{record(200009, 1)}\n[rank1]: {record(200009, 1)}\n[rank1]: step\n{record(200009, 2)}\n".encode()
        output, events = tmp_path / "output.log", tmp_path / "events.jsonl"
        projector = LogProjector(output, events, clock=lambda: 0.0)

        for end in range(1, len(text) + 1):
            output.write_bytes(text[:end])
            while projector.advance():
                pass
        projector.advance(final=True)

        steps = [json.loads(line)["step"] for line in events.read_text().splitlines() if '"metrics"' in line]
        assert steps == [1, 2]
