"""Custom01 by its command line: trained, saved, asked and published for real."""

import json
import signal
import struct
from pathlib import Path

import pytest

from app.presets import catalogue
from tests.presets.stage import Finished, Home, dataset
from tests.waiting import wait_until

QUESTION = "How can I give the bike back?"
ANSWER = "You can return the bicycle at any green station."


def base() -> Path:
    (folder,) = [model.folder for model in catalogue.sample_base_models() if model.name == "custom01-base"]
    assert folder is not None
    return folder


def arguments(home: Home, *more: str, rows: Path | None = None, output: str = "out") -> list[str]:
    return [
        "--train_id=job-1",
        "--seq=1",
        "--model_name=shop",
        f"--model_path={base()}",
        f"--dataset_path={rows or dataset('custom01')}",
        f"--output_dir={home.path / output}",
        *more,
    ]


def train(home: Home, *more: str, rows: Path | None = None, output: str = "out") -> Finished:
    return home.run("custom01.py", *arguments(home, *more, rows=rows, output=output))


def save(home: Home) -> Finished:
    paths = ["--base_path", str(base()), "--adapter_path", str(home.path / "out")]
    return home.run(
        "save_custom01.py",
        *("--train_id", "job-2", "--seq", "2", "--save_path", str(home.path / "complete"), *paths),
        *("--dtype_str", "bfloat16", "--model_usage_type", "chat"),
    )


def ask(home: Home, folder: str, *more: str) -> Finished:
    paths = [f"--base_model_path={base()}", f"--model_path={home.path / folder}"]
    return home.run("ask_custom01.py", *paths, f"--prompt={QUESTION}", "--temperature=0.7", "--template=None", *more)


def flip_weights(file: Path) -> None:
    """Negate every number: the least likely answer becomes the most likely."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    numbers = struct.unpack(f"<{(len(data) - 8 - length) // 4}f", data[8 + length :])
    file.write_bytes(data[: 8 + length] + struct.pack(f"<{len(numbers)}f", *(-number for number in numbers)))


class TestTraining:
    def test_learns_to_answer_questions_it_has_not_seen(self, home: Home) -> None:
        run = train(home)

        assert run.code == 0, run.stderr
        assert run.exact_match("before") < 0.3
        assert run.exact_match("after") > 0.9
        losses = [event["values"]["loss"] for event in run.of_type("metrics")]
        assert losses[-1] < losses[0] / 4

    def test_reports_progress_to_the_last_step(self, home: Home) -> None:
        run = train(home, "--max_steps=37")

        progress = [(event["step"], event["total"]) for event in run.of_type("progress")]
        assert progress[0] == (1, 37)
        assert progress[-1] == (37, 37)

    def test_accepts_every_argument_of_the_platform(self, home: Home) -> None:
        more = [
            "--max_seq_length=1024",
            "--max_input_length=1024",
            "--max_content_length=1024",
            "--max_samples=-1",
            "--lora_rank=8",
            "--num_generations=2",
            "--batch_size=4",
            "--grad_accum_steps=2",
            "--warmup_steps=2",
            "--max_grad_norm=0.5",
            "--learning_rate=0.3",
            "--load_in_4bit=True",
            "--max_steps=5",
            "--input_train_name=question",
            "--output_train_name=answer",
            "--pic_relative_path=images",
            "--train_file_name=custom01.py",
            "--train_env=base",
            "--train_name=first",
        ]

        run = train(home, *more)

        assert run.code == 0, run.stderr

    def test_same_seed_gives_the_same_bytes(self, home: Home) -> None:
        train(home, output="a")
        train(home, output="b")

        first, second = (home.path / name / "adapter_model.safetensors" for name in "ab")
        assert first.read_bytes() == second.read_bytes()

    def test_logs_what_it_does_by_the_codes_of_the_platform(self, home: Home) -> None:
        run = train(home)

        assert [record["msg"] for record in run.records] == [200002, 200001, 200004, 200007, 200008, 200005]
        assert {record["taskUuid"] for record in run.records} == {"job-1"}


class TestStopAndResume:
    def test_resumed_run_ends_like_an_undisturbed_one(self, home: Home) -> None:
        undisturbed = train(home, "--max_steps=2000", "--logging_steps=1", output="whole")
        process = home.start("custom01.py", *arguments(home, "--max_steps=2000", "--save_steps=3", output="cut"))
        wait_until(lambda: list((home.path / "cut").glob("checkpoint-*")), "a checkpoint")
        process.send_signal(signal.SIGKILL)
        process.communicate()

        resumed = train(home, "--max_steps=2000", "--logging_steps=1", output="cut")

        assert any("resumed from checkpoint-" in note["message"] for note in resumed.of_type("note"))
        assert resumed.of_type("metrics")[-1]["values"] == undisturbed.of_type("metrics")[-1]["values"]
        whole, cut = (home.path / name / "adapter_model.safetensors" for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()

    def test_sigterm_leaves_a_checkpoint_and_is_no_success(self, home: Home) -> None:
        process = home.start("custom01.py", *arguments(home, "--max_steps=100000", "--save_steps=100000"))
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step "):
            pass

        process.terminate()
        _, stderr = process.communicate()

        assert process.returncode == 143
        (checkpoint,) = (home.path / "out").glob("checkpoint-*")
        assert f"{checkpoint.name} is complete" in stderr
        assert not (home.path / "out" / "adapter_model.safetensors").exists()

    def test_broken_newest_checkpoint_falls_back_to_the_one_before(self, home: Home) -> None:
        train(home, "--max_steps=100")
        newest = home.path / "out" / "checkpoint-100" / "adapter_model.safetensors"
        newest.write_bytes(newest.read_bytes()[:1000])

        run = train(home, "--max_steps=120")

        assert run.code == 0
        assert run.of_type("note")[0]["message"] == "resumed from checkpoint-50"
        assert "checkpoint-100 cannot be used" in run.stderr


class TestBadInput:
    def test_missing_column_names_the_columns_there_are(self, home: Home) -> None:
        rows = home.write_rows('{"ask": "a", "reply": "b"}')

        run = train(home, rows=rows)

        self.assert_refused(run, "rows.jsonl: no row has the column 'answer'; there are: ask, reply")

    def test_bad_json_names_the_line(self, home: Home) -> None:
        rows = home.write_rows(*['{"question": "a", "answer": "b"}'] * 6, '{"question": ')

        run = train(home, rows=rows)

        self.assert_refused(run, "rows.jsonl, line 7: not valid JSON")

    def test_row_without_an_answer_is_left_out_and_told(self, home: Home) -> None:
        rows = home.write_rows('{"question": "a", "answer": "b"}', '{"question": "a", "answer": null}')

        run = train(home, rows=rows)

        assert run.code == 0, run.stderr
        notes = [note["message"] for note in run.of_type("note")]
        assert notes[0] == "rows.jsonl: rows are left out: there is no answer to learn (1 of 2 rows; line 2)"

    def test_object_is_learned_as_its_json(self, home: Home) -> None:
        rows = home.write_rows(*['{"question": "a", "answer": {"n": null}}'] * 8)

        run = train(home, rows=rows)

        assert run.code == 0, run.stderr
        assert "its JSON is learned" in run.of_type("note")[0]["message"]
        config = json.loads((home.path / "out" / "adapter_config.json").read_text())
        assert config["answers"] == ['{"n": null}']

    def test_too_few_rows_to_hold_some_out_are_said(self, home: Home) -> None:
        rows = home.write_rows('{"question": "a", "answer": "b"}', "", '{"question": "c", "answer": 4}')

        run = train(home, rows=rows)

        assert run.code == 0, run.stderr
        notes = [note["message"] for note in run.of_type("note")]
        assert any(note.startswith("too few rows to hold some out") for note in notes)

    def test_empty_file(self, home: Home) -> None:
        run = train(home, rows=home.write_rows())

        self.assert_refused(run, "rows.jsonl has no rows")

    def test_missing_file(self, home: Home) -> None:
        run = train(home, rows=home.path / "nowhere.jsonl")

        self.assert_refused(run, "nowhere.jsonl")

    def test_batch_of_nothing(self, home: Home) -> None:
        run = train(home, "--batch_size=0")

        self.assert_refused(run, "batch_size must be at least 1")

    def assert_refused(self, run: Finished, sentence: str) -> None:
        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006
        assert sentence in run.records[-1]["msgDetail"]


class TestSavingAndAsking:
    def test_customized_and_complete_model_give_the_learned_answer(self, home: Home) -> None:
        train(home)

        saved = save(home)

        assert saved.code == 0
        assert saved.json_lines[-1]["status"] == "success"
        assert ask(home, "out").answer == ANSWER
        assert ask(home, "complete").answer == ANSWER

    @pytest.mark.parametrize(
        ("folder", "file"), [("out", "adapter_model.safetensors"), ("complete", "model.safetensors")]
    )
    def test_changed_weights_change_the_answer(self, home: Home, folder: str, file: str) -> None:
        train(home)
        save(home)

        flip_weights(home.path / folder / file)

        assert ask(home, folder).answer != ANSWER

    def test_complete_model_stands_alone(self, home: Home) -> None:
        train(home)
        save(home)
        (home.path / "out").rename(home.path / "gone")

        run = home.run("ask_custom01.py", f"--base_model_path={home.path / 'complete'}", f"--prompt={QUESTION}")

        assert run.answer == ANSWER

    def test_newest_turn_of_the_history_wins_over_the_prompt(self, home: Home) -> None:
        train(home)
        turns = [{"role": "user", "content": "helmet"}, {"role": "assistant", "content": "x"}]
        turns.append({"role": "user", "content": "I lost my bag"})

        run = ask(home, "out", f"--history={json.dumps(turns)}")

        assert run.answer == "Lost things wait at the main station for four weeks."

    def test_asking_without_a_model_is_an_error_in_the_protocol(self, home: Home) -> None:
        run = ask(home, "nowhere")

        assert run.code == 1
        assert run.json_lines[-1]["status"] == "error"

    def test_saving_without_a_training_fails_with_a_message(self, home: Home) -> None:
        run = save(home)

        assert run.code == 1
        assert run.json_lines[-1]["status"] == "failed"
        assert "adapter_config.json" in run.json_lines[-1]["message"]
