"""Failures of the service as the command line tells them, by exit code and text."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.client import Api, ConnectionLost, ServiceRefused, Unreachable
from tests.cli.standin import Answer, Request, Script, document, problem, stand_in, stream

NO_METHODS = document({"items": [], "next_cursor": None})


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    return CliRunner()


class TestExitCodes:
    def test_0_and_an_empty_list(self, runner: CliRunner) -> None:
        with stand_in(lambda _: NO_METHODS) as (url, asked):
            result = runner.invoke(app, ["methods", "list", "--url", url, "--json"])

        assert result.exit_code == 0
        assert json.loads(result.stdout) == {"items": []}
        assert asked[0].path.startswith("/api/v1/methods?")

    def test_2_for_wrong_usage(self, runner: CliRunner) -> None:
        assert runner.invoke(app, ["jobs", "list", "--limit", "none"]).exit_code == 2
        assert runner.invoke(app, ["no-such-command"]).exit_code == 2

    def test_2_for_settings_that_cannot_be_used(self, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEEPE_PORT", "70000")

        result = runner.invoke(app, ["settings"])

        assert result.exit_code == 2
        assert "DEEPE_PORT" in result.stderr

    def test_3_when_nobody_answers(self, runner: CliRunner) -> None:
        result = runner.invoke(app, ["methods", "list", "--url", "http://127.0.0.1:9"])

        assert result.exit_code == 3
        assert "deepe dev" in result.stderr

    def test_4_with_every_reason(self, runner: CliRunner, tmp_path: Path) -> None:
        refusal = problem(
            422,
            "invalid_request",
            "Two problems.",
            {"pointer": "/stages/saving/file", "code": "file_required", "detail": "Name a file."},
            {"pointer": "/name", "code": "name_taken", "detail": "Choose another name."},
        )
        file = tmp_path / "method.json"
        file.write_text("{}")
        with stand_in(lambda _: refusal) as (url, _asked):
            result = runner.invoke(app, ["methods", "create", str(file), "--url", url])

        assert result.exit_code == 4
        assert "Two problems." in result.stderr
        assert "/stages/saving/file: Name a file." in result.stderr
        assert "/name: Choose another name." in result.stderr

    def test_4_prints_the_problem_document_with_json(self, runner: CliRunner) -> None:
        with stand_in(lambda _: problem(404, "method_not_found", "There is none.")) as (url, _asked):
            result = runner.invoke(app, ["methods", "show", "x", "--url", url, "--json"])

        assert result.exit_code == 4
        assert json.loads(result.stderr)["code"] == "method_not_found"
        assert result.stdout == ""

    def test_5_when_the_service_failed(self, runner: CliRunner) -> None:
        with stand_in(lambda _: problem(503, "database_busy", "Try again.")) as (url, _asked):
            result = runner.invoke(app, ["jobs", "list", "--url", url])

        assert result.exit_code == 5
        assert "Try again." in result.stderr

    def test_says_so_when_another_program_listens(self, runner: CliRunner) -> None:
        with stand_in(lambda _: Answer(200, b"<html>", "text/html")) as (url, _asked):
            result = runner.invoke(app, ["methods", "list", "--url", url])

        assert result.exit_code == 4
        assert "another program" in result.stderr

    def test_are_explained_in_the_help(self, runner: CliRunner) -> None:
        result = runner.invoke(app, ["--help"])

        assert "Exit codes" in result.stdout
        assert "3 no service answers" in " ".join(result.stdout.split())


class TestApi:
    def test_sends_the_token_and_the_persons_language(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LANG", "zh_CN.UTF-8")
        with stand_in(lambda _: NO_METHODS) as (url, asked), Api(url, token="a-token-of-16-chars") as api:
            api.get("/methods")

        assert asked[0].headers["authorization"] == "Bearer a-token-of-16-chars"
        assert asked[0].headers["accept-language"] == "zh"

    def test_ignores_a_proxy_for_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with stand_in(lambda _: NO_METHODS) as (url, _asked), Api(url) as api:
            assert api.get("/methods") == {"items": [], "next_cursor": None}

    def test_follows_pages_up_to_the_limit(self) -> None:
        one, two = {"id": "1"}, {"id": "2"}
        pages = iter([{"items": [one], "next_cursor": "c"}, {"items": [two], "next_cursor": "d"}])
        with stand_in(lambda _: document(next(pages))) as (url, asked), Api(url) as api:
            assert list(api.items("/jobs", limit=2)) == [one, two]

        assert len(asked) == 2
        assert "cursor=c" in asked[1].path

    def test_repeats_a_create_whose_answer_was_lost_with_the_same_key(self) -> None:
        answers = iter([Answer(201, b"{", cut=True), document({"id": "1"}, status=201)])
        with stand_in(lambda _: next(answers)) as (url, asked), Api(url) as api:
            assert api.post("/jobs", {"method": "m"}) == {"id": "1"}

        keys = [request.headers["idempotency-key"] for request in asked]
        assert len(keys) == 2
        assert keys[0] == keys[1]

    def test_deletes_what_it_has_read(self) -> None:
        def script(request: Request) -> Answer:
            if request.method == "GET":
                return Answer(200, b"{}", headers={"ETag": '"7"'})
            return Answer(204)

        with stand_in(script) as (url, asked), Api(url) as api:
            api.delete("/methods/x", {"jobs": None})

        assert [request.method for request in asked] == ["GET", "DELETE"]
        assert asked[1].headers["if-match"] == '"7"'

    def test_uploads_a_file_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "faq.jsonl"
        file.write_bytes(b'{"a": 1}\r\n')
        with stand_in(lambda _: document({"id": "1"})) as (url, asked), Api(url) as api:
            api.put_file("/datasets/faq/file", file)

        assert asked[0].body == b'{"a": 1}\r\n'

    def test_says_that_a_stream_broke_off(self) -> None:
        script: Script = lambda _: stream(("1", "log", {"text": "a"}), cut=True)  # noqa: E731
        with stand_in(script) as (url, _asked), Api(url) as api:
            events = api.stream("GET", "/jobs/1/events")
            assert next(events).data == {"text": "a"}
            with pytest.raises(ConnectionLost):
                next(events)

    def test_says_why_a_stream_was_refused(self) -> None:
        with stand_in(lambda _: problem(404, "job_not_found", "None.")) as (url, _asked), Api(url) as api:
            events: Iterator[object] = api.stream("GET", "/jobs/1/events")
            with pytest.raises(ServiceRefused, match="None"):
                next(events)

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
    def test_refuses_what_is_no_address(self, url: str) -> None:
        with pytest.raises(Unreachable, match="http://"):
            Api(url)


class TestChat:
    END = {"finish_reason": "stop", "job": "j1", "error": None, "reason_detail": None}

    def test_prints_the_answer_piece_by_piece(self, runner: CliRunner) -> None:
        told = stream(("1", "piece", {"text": "8 is"}), ("2", "piece", {"text": " larger."}), ("3", "done", self.END))

        with stand_in(lambda _: told) as (url, _):
            result = runner.invoke(app, ["models", "chat", "m", "Which?", "--url", url])

        assert (result.exit_code, result.stdout) == (0, "8 is larger.\n")

    @pytest.mark.parametrize("reason", ["error", "cancelled"])
    @pytest.mark.parametrize("as_json", [False, True])
    def test_1_with_what_the_script_and_the_job_say(self, runner: CliRunner, reason: str, as_json: bool) -> None:
        end = {**self.END, "finish_reason": reason, "error": "CUDA is gone", "reason_detail": "Ask again later."}
        told = stream(("1", "piece", {"text": "8"}), ("2", "done", end))

        with stand_in(lambda _: told) as (url, _):
            result = runner.invoke(app, ["models", "chat", "m", "Which?", "--url", url, *(["--json"] * as_json)])

        assert result.exit_code == 1
        for words in ("CUDA is gone", "Ask again later.", "deepe jobs logs j1"):
            assert words in result.stderr

    def test_sends_pictures_with_the_question(self, runner: CliRunner, tmp_path: Path) -> None:
        picture = tmp_path / "a.webp"
        picture.write_bytes(b"drawn")

        with stand_in(lambda _: stream(("1", "done", self.END))) as (url, asked):
            result = runner.invoke(app, ["models", "chat", "m", "What?", "--image", str(picture), "--url", url])

        assert result.exit_code == 0
        images = [{"data": "data:image/webp;base64,ZHJhd24="}]
        assert json.loads(asked[0].body)["messages"] == [{"role": "user", "content": "What?", "images": images}]

    @pytest.mark.parametrize(("name", "told"), [("a.txt", "is not called like a picture"), ("a.png", "cannot be read")])
    def test_1_for_what_is_no_picture(self, runner: CliRunner, tmp_path: Path, name: str, told: str) -> None:
        result = runner.invoke(app, ["models", "chat", "m", "What?", "--image", str(tmp_path / name)])

        assert result.exit_code == 1
        assert told in result.stderr

    def test_1_for_an_answer_without_its_end(self, runner: CliRunner) -> None:
        with stand_in(lambda _: stream(("1", "piece", {"text": "8"}))) as (url, _):
            result = runner.invoke(app, ["models", "chat", "m", "Which?", "--url", url])

        assert result.exit_code == 1
        assert "broke off" in result.stderr


class TestDeleteMethod:
    def test_says_what_is_gone(self, runner: CliRunner) -> None:
        def script(request: Request) -> Answer:
            return Answer(204) if request.method == "DELETE" else Answer(200, b"{}", headers={"ETag": '"a.1"'})

        with stand_in(script) as (url, asked):
            talk = runner.invoke(app, ["methods", "delete", "mine", "--url", url])
            raw = runner.invoke(app, ["methods", "delete", "mine", "--jobs", "keep", "--url", url, "--json"])

        assert talk.stdout == "mine is deleted\n"
        assert json.loads(raw.stdout) == {"deleted": "mine"}
        assert (asked[-1].path, asked[-1].headers["if-match"]) == ("/api/v1/methods/mine?jobs=keep", '"a.1"')
