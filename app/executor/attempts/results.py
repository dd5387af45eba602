"""Did a stage succeed? The contract's rule for the stage, then a look at what it made.

Exit code 0 alone is not success: scripts report failure through their status key in Redis or through the result that
they print, and a folder without loadable weights is no model. An unknown exit is never success.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

from app.domain.enums import EndReason, JobKind
from app.domain.errors import AppError
from app.domain.kinds import Stage
from app.domain.plain_text import shown, storable, storable_document
from app.executor.attempts.artifacts import Artifact, ArtifactProblem, find_model, saved_beside
from app.executor.attempts.classification import Failure, classify, last_words, recognise, words_of_exception
from app.executor.attempts.last_words import LOG_DATA
from app.executor.attempts.script_status import FAILED
from app.executor.engines.base import ExitRecord, ExitWhy
from app.executor.runs.job_spec import JobSpec
from app.registry.base_models.card import read_card
from app.registry.models.files import UnusableFile
from app.registry.scripts.names import SUFFIX

_SUCCESS = re.compile(r"\bsuccess(?:fully)?\b", re.IGNORECASE)
MAX_DETAIL = 500  # characters of an error
_SILENT = "(no output)"


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended.

    `result` is the object that the script printed, `artifact` the model it made, `card` that of a base model it made.
    `saved` is the complete model that a training wrote beside its adapter.
    """

    succeeded: bool
    reason: EndReason
    detail: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    artifact: Artifact | None = None
    saved: Artifact | None = None
    card: Mapping[str, Any] | None = None


def judge(
    stage: Stage,
    exit_record: ExitRecord,
    *,
    log_tail: Sequence[str],
    script_status: int | None,
    output_dir: Path | None,
    output: str | None = None,
    produces: bool = False,
) -> Verdict:
    """Decide on an attempt that has ended. Reads the output folder: call it in a thread.

    `output_dir` None: the caller chose where the script writes and how, so that nothing is looked for. `output`: where
    in it the method says that the model lies. `produces`: a saving script makes the method's first model, so that it
    need not print a result, as a training need not.

    `log_tail` are the last lines of stdout and stderr together (as `tail_lines` gives them); noise is expected.
    """
    if not _exited_cleanly(exit_record):
        return _failed(classify(exit_record, log_tail))
    if script_status == FAILED:
        # the script says that it failed; its output may say why
        return _failed(
            recognise(log_tail) or _plain(EndReason.SCRIPT_REPORTED_FAILURE, last_words(log_tail) or _SILENT)
        )
    match stage:
        case JobKind.TRAINING:
            return _with_cause(_judge_output(output_dir, output, complete=False), log_tail)
        case JobKind.SAVING:
            printed = judge_printed_result(log_tail)
            if not printed.succeeded and not (produces and printed.result is None):
                return printed
            return _with_cause(_judge_output(output_dir, output, complete=True, result=printed.result), log_tail)
        case JobKind.DEPLOYMENT:
            return judge_printed_result(log_tail)
        case JobKind.INFERENCE_CUSTOMIZED | JobKind.INFERENCE_COMPLETE:
            return _judge_answer(log_tail)
        case _:
            assert_never(stage)


def judge_printed_result(log_tail: Sequence[str]) -> Verdict:
    """Apply the contract's rule for saving and deployment to what the script printed.

    The last line that is a JSON object decides by its `status`; without any, the word `success` does ("unsuccessful" is
    another word) outside of such objects. Objects without a status, such as log lines of a library, are looked past.
    """
    objects, text = _objects_and_text(log_tail)
    result = next((document for document in reversed(objects) if "status" in document), None)
    if result is not None:
        if str(result["status"]).lower() == "success":
            return Verdict(succeeded=True, reason=EndReason.COMPLETED, result=result)
        message = result.get("message") or result.get("error") or f"status {result['status']}"
        cause = recognise([str(message)]) or _plain(EndReason.RESULT_FAILED, str(message))
        return _failed(cause, result=result)
    if any(_SUCCESS.search(line) for line in text if LOG_DATA not in line):
        return Verdict(succeeded=True, reason=EndReason.COMPLETED)
    words = last_words(log_tail)
    return _failed(_plain(EndReason.RESULT_FAILED, words or "the script printed no result"))


def json_objects(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the JSON objects that stand on lines of their own, in order; one may span several lines."""
    return _objects_and_text(lines)[0]


def with_unpinned(verdict: Verdict, spec: JobSpec, scripts: Path) -> Verdict:
    """Name a module that the environment lacks as not pinned, if it lies where the script would look for it."""
    if verdict.reason is not EndReason.MODULE_MISSING or spec.script is None or spec.script.tree is None:
        return verdict
    module = str(verdict.params.get("module"))
    for place in ((scripts / spec.script.file).parent / module, scripts / module):
        if place.with_name(f"{module}{SUFFIX}").is_file() or any(place.glob(f"*{SUFFIX}")):
            params = {**verdict.params, "file": place.relative_to(scripts).as_posix()}
            return replace(verdict, reason=EndReason.FILE_NOT_PINNED, params=params)
    return verdict


def judge_program(exit_record: ExitRecord, log_tail: Sequence[str]) -> Verdict:
    """Decide on a program of the product: its exit code says all."""
    if _exited_cleanly(exit_record):
        return Verdict(succeeded=True, reason=EndReason.COMPLETED)
    return _failed(classify(exit_record, log_tail))


def judge_build(exit_record: ExitRecord, log_tail: Sequence[str]) -> Verdict:
    """Decide on the building of an environment."""
    verdict = judge_program(exit_record, log_tail)
    return replace(verdict, reason=EndReason.ENV_BUILD_FAILED) if verdict.reason is EndReason.EXIT_CODE else verdict


def judge_base_model(exit_record: ExitRecord, log_tail: Sequence[str], folder: Path, *, root: Path) -> Verdict:
    """Decide on the making of a base model: its folder must be one. Reads it: call it in a thread."""
    built = judge_program(exit_record, log_tail)
    if not built.succeeded:
        return built
    try:
        card = read_card(folder, roots=[root])
    except (AppError, UnusableFile, OSError) as error:
        detail = shown(error.detail() if isinstance(error, AppError) else str(error), limit=MAX_DETAIL)
        return _failed(Failure(reason=EndReason.OUTPUT_INVALID, detail=detail, params={"detail": detail}))
    return replace(built, card=card.model_dump(mode="json"))


def _objects_and_text(lines: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the objects, and the lines that are no part of one."""
    text = "\n".join(lines)
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    others: list[str] = []
    position = 0
    for match in re.finditer(r"^[ \t]*(?=\{)", text, re.MULTILINE):
        if match.start() < position:
            continue
        try:
            document, end = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        rest = text[end:].partition("\n")[0]
        if isinstance(document, dict) and not rest.strip():
            found.append(storable_document(document))
            others += text[position : match.start()].splitlines()
            position = end
    return found, [*others, *text[position:].splitlines()]


def _exited_cleanly(exit_record: ExitRecord) -> bool:
    return exit_record.why is ExitWhy.EXITED and exit_record.code == 0 and exit_record.signal is None


def _judge_answer(log_tail: Sequence[str]) -> Verdict:
    """An inference script may report an error in its protocol and still exit with code 0."""
    for document in json_objects(log_tail):
        if document.get("status") == "error":
            error = str(document.get("error") or "the script gave no reason")
            return _failed(recognise([error]) or _plain(EndReason.SCRIPT_REPORTED_FAILURE, error))
    return Verdict(succeeded=True, reason=EndReason.COMPLETED)


def _judge_output(
    output_dir: Path | None, output: str | None, *, complete: bool, result: Mapping[str, Any] | None = None
) -> Verdict:
    if output_dir is None:
        return Verdict(succeeded=True, reason=EndReason.COMPLETED, result=result)
    try:
        artifact = find_model(output_dir, output, complete=complete)
    except ArtifactProblem as problem:
        return _failed(_plain(problem.reason, problem.detail), result=result)
    saved = None if complete else saved_beside(artifact, output_dir)
    return Verdict(succeeded=True, reason=EndReason.COMPLETED, result=result, artifact=artifact, saved=saved)


def _with_cause(verdict: Verdict, log_tail: Sequence[str]) -> Verdict:
    """Add to a verdict of no model what the output says of it: some scripts print a traceback and exit with code 0."""
    if verdict.reason is not EndReason.OUTPUT_MISSING:
        return verdict
    if cause := recognise(log_tail):
        return _failed(cause, result=verdict.result)
    words = words_of_exception(log_tail)
    return _failed(_plain(verdict.reason, f"{verdict.detail}; {words}"), result=verdict.result) if words else verdict


def _plain(reason: EndReason, detail: str) -> Failure:
    detail = storable(detail[:MAX_DETAIL])
    return Failure(reason=reason, detail=detail, params={"detail": detail})


def _failed(failure: Failure, *, result: Mapping[str, Any] | None = None) -> Verdict:
    return Verdict(succeeded=False, reason=failure.reason, detail=failure.detail, params=failure.params, result=result)
