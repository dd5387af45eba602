"""Show what a training would be given and would learn of single rows: by the training's own code, in its environment.

Only the environment of the method has a tokenizer, so a preview is a job that runs a program of the product there and
writes its answer into the run folder. What needs no tokenizer is answered at once. Answers are remembered by all that
they are made of: the same preview asked again starts no job.
"""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from app.domain.enums import JobKind, JobStatus, TrainingType
from app.domain.errors import Conflict, InvalidRequest, Unavailable, Violation
from app.domain.kinds import Stage
from app.domain.lifecycle import chain
from app.domain.names import BASE_ENVIRONMENT
from app.domain.plain_text import storable_document
from app.executor.jobs.base_model_builds import must_be_made
from app.executor.jobs.chat_service import cancel_abandoned
from app.executor.jobs.data_check import data_rules, rows_wanted
from app.executor.jobs.inference_requests import PRIORITY
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.jobs.submission_inputs import base_model_findings
from app.executor.jobs.token_lengths import TokenLengths, lengths_key
from app.executor.nodes.notifier import Notifier
from app.executor.runs.job_spec import JobSpec, Named, RowsToPreview
from app.executor.runs.run_folder import RunFolder
from app.executor.runs.stream import JobStreams, StreamPosition
from app.presets.shared.helpers.deepe_rows import CONVERSATION, LABELLED, PREFERENCE, QUESTION, TEXT, Refused
from app.presets.shared.helpers.deepe_rows.lengths import Lengths
from app.presets.shared.helpers.deepe_rows.preview import PARAMETERS, preview
from app.presets.shared.helpers.deepe_rows.survey import wanted_of
from app.registry.base_models.findings import LoadingPermission, Severity
from app.registry.base_models.service import BaseModels
from app.registry.datasets.service import Datasets
from app.registry.methods.record import Method, method_of
from app.registry.methods.runs import MethodRuns
from app.store import jobs as store
from app.store import submissions
from app.store.clock import database_now
from app.store.home import Home
from app.store.methods import MethodNotFound
from app.store.nodes import working_nodes
from app.store.session import Database
from app.store.tables import JobRow

PATIENCE_SECONDS: Final = 60
FIRST_REPORT_SECONDS: Final = 10
"""After the start of the service: the worker of `deepe dev` reports a second or two after the API answers."""
MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024
TOKENIZED: Final = frozenset({CONVERSATION, TEXT, PREFERENCE, LABELLED, QUESTION})
"""Kinds of examples that become tokens by a chat template or as a text; the others are shown as they were read."""

_LOOK_SECONDS = 0.1
_REMEMBERED_BYTES = 16 * 1024 * 1024


_WITHOUT_TRANSFORMERS = "preview_without_transformers"
_POINTERS = {
    _WITHOUT_TRANSFORMERS: "/method",
    "preview_tokenizer_unreadable": "/base_model",
    "preview_template_refused": "/parameters",
}


class NoNodeAlive(Conflict):
    """No worker takes jobs."""

    code = "no_node_alive"


class BaseModelNotMade(Conflict):
    """The sample base model is made by the first training that starts from it."""

    code = "base_model_not_made"


class EnvironmentNotBuilt(Conflict):
    """No node that takes jobs has the environment; a preview does not wait until it is built."""

    code = "preview_environment_not_built"


class PreviewFailed(Conflict):
    """The program that makes the preview failed."""

    code = "preview_failed"


class PreviewTookTooLong(Unavailable):
    """No answer came in time: the nodes are busy, or the rows are very long."""

    code = "preview_took_too_long"


PREVIEW_ERRORS: Final = (BaseModelNotMade, EnvironmentNotBuilt, NoNodeAlive, PreviewFailed, PreviewTookTooLong)
"""What may prevent a preview."""


@dataclass(frozen=True)
class PreviewRequest:
    """What to show; `lines` None are the first rows."""

    method: str
    base_model: str
    dataset: str
    lines: Sequence[int] | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """Rows and what becomes of them, see `deepe_rows.preview`, and the lengths of all rows, see `deepe_rows.lengths`.

    `kinds`: what the method learns from, None if that is not known. `exact`: shown by the code that the training runs,
    not only by our reader. `tokenized`: the rows have sequences. `turn_end`: the token that ends an answer and the
    base model's own `eos`, where they differ.
    """

    method: str
    base_model: str
    dataset: str
    environment: str
    rows: Sequence[Mapping[str, Any]]
    total: int
    kinds: Sequence[str] | None = None
    exact: bool = False
    tokenized: bool = False
    own_template: bool = True
    turn_end: Mapping[str, str] | None = None
    lengths: Lengths | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the training, with its defaults."""


@dataclass(frozen=True)
class _Plan:
    """What is shown, and for kinds that become tokens the job that shows it and the keys of what it answers."""

    preview: Preview
    jsonl: Path
    rows: RowsToPreview | None
    lines: Sequence[int] | None
    job: JobRow | None = None
    key: str = ""
    lengths_key: str = ""


class RowPreviews:
    """Answers previews."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        runs: MethodRuns,
        datasets: Datasets,
        base_models: BaseModels,
        parameters: StageParameters,
        streams: JobStreams,
        notifier: Notifier,
        lengths: TokenLengths,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._home = home
        self._runs = runs
        self._datasets = datasets
        self._base_models = base_models
        self._parameters = parameters
        self._streams = streams
        self._notifier = notifier
        self._lengths = lengths
        self._clock = clock
        self._answers = _Answers()
        self._nodes_expected_until = time.monotonic() + FIRST_REPORT_SECONDS

    async def preview(self, request: PreviewRequest) -> Preview:
        """Return what becomes of the rows. Cancelled, it cancels its job. Raises what refuses or prevents a preview."""
        async with self._database.reading() as session:
            found = await submissions.find_named(
                session, method=request.method, base_model=request.base_model, dataset=request.dataset
            )
        if found is None:
            raise MethodNotFound(method=request.method)
        plan = await asyncio.to_thread(self._plan, request, found)
        if plan.job is None:
            return await asyncio.to_thread(_as_read, plan)
        remembered = self._answers.get(plan.key)
        if remembered is not None:
            answered = await asyncio.to_thread(self._answered, plan, remembered)
            if answered.lengths is not None or not answered.tokenized:  # lengths are forgotten for themselves
                return answered
        await self._check_environment(plan.preview.environment)
        document = await self._made(plan.job)
        self._answers.keep(plan.key, document)
        return await asyncio.to_thread(self._answered, plan, document)

    # ---- planning: files and scripts, no statement is run ------------------------------------------------------------

    def _plan(self, request: PreviewRequest, found: submissions.Named) -> _Plan:
        """Check the request. Raises `InvalidRequest` with everything that is wrong. Blocks."""
        method = self._runs.as_edited(method_of(found.method, found.version))
        stage = _training_stage(method)
        checked = self._parameters.check(method, [stage], request.parameters, None)
        wrong = [*checked.violations, *self._unusable(request, found, method)]
        if wrong:
            raise InvalidRequest(wrong)
        base, data = found.base_model, found.dataset
        assert base is not None
        assert data is not None
        inspection = self._datasets.current(data)
        jsonl = self._datasets.jsonl_of(data) if inspection is None else inspection.jsonl
        digest = data.digest if inspection is None else inspection.digest
        rules = data_rules(method, stage)
        values = checked.values(stage)
        shown = Preview(
            method=method.name,
            base_model=base.name,
            dataset=data.name,
            environment=method.environment(stage) or BASE_ENVIRONMENT,
            rows=(),
            total=data.rows if inspection is None else inspection.report.rows,
            kinds=None if rules is None else sorted(rules.kinds(values)),
            exact=rules is not None and rules.encoded_by_helpers,
            parameters=values,
        )
        lines = None if request.lines is None else tuple(sorted(set(request.lines)))
        rows = None if rules is None else RowsToPreview(**asdict(rows_wanted(rules, values)), lines=lines)
        if rows is None or not TOKENIZED.intersection(rows.kinds):
            return _Plan(shown, jsonl, rows, lines)
        measured = lengths_key(method, stage, self._home.absolute(base.path), digest, values)
        spec = JobSpec(
            training_type=TrainingType(method.definition.training_type or ""),
            technique=method.definition.technique,
            base_model=Named(id=base.id, name=base.name, path=base.path),
            permits=LoadingPermission.of(base).permits,
            dataset=Named(id=data.id, name=data.name, path=self._home.relative(jsonl), digest=digest),
            effective={name: values[name] for name in PARAMETERS if values.get(name) is not None},
            preview=rows,
        )
        key = hashlib.sha256(json.dumps([spec.document(), measured], sort_keys=True).encode()).hexdigest()
        if self._lengths.find(measured) is not None:
            spec = spec.model_copy(update={"preview": rows.model_copy(update={"measure": False})})
        return _Plan(shown, jsonl, rows, lines, self._job(method, shown, spec), key, measured)

    def _unusable(self, request: PreviewRequest, found: submissions.Named, method: Method) -> list[Violation]:
        """Return why the base model or the data set cannot be used."""
        wrong = []
        if found.dataset is None:
            wrong.append(Violation("/dataset", "unknown_dataset", {"dataset": request.dataset}))
        base = found.base_model
        if base is None:
            return [*wrong, Violation("/base_model", "unknown_base_model", {"base_model": request.base_model})]
        if must_be_made(base, base.path, self._home):
            raise BaseModelNotMade(base_model=base.name)
        if not self._home.absolute(base.path).exists():
            return [*wrong, Violation("/base_model", "files_missing", {"name": base.name, "path": base.path})]
        judged = base_model_findings(self._base_models.current_card(base), base, method, own_script=True)
        return [*wrong, *(one.violation for one in judged if one.severity is Severity.ERROR)]

    def _job(self, method: Method, shown: Preview, spec: JobSpec) -> JobRow:
        assert spec.base_model is not None
        assert spec.dataset is not None
        return store.new_job(
            kind=JobKind.PREVIEW,
            name=shown.dataset,
            environment=shown.environment,
            launch=spec.document(),
            now=self._clock(),
            priority=PRIORITY,
            method_id=method.id,
            method_name=method.name,
            method_version=method.version,
            base_model_id=spec.base_model.id,
            dataset_id=spec.dataset.id,
        )

    # ---- the job ----------------------------------------------------------------------------------------------------

    async def _check_environment(self, environment: str) -> None:
        """Wait for nodes that start with the service; raise why none can run the preview."""
        while (problem := await self._without_node(environment)) is not None:
            if time.monotonic() >= self._nodes_expected_until:
                raise problem
            await asyncio.sleep(_LOOK_SECONDS)

    async def _without_node(self, environment: str) -> Conflict | None:
        async with self._database.reading() as session:
            nodes = await working_nodes(session, now=await database_now(session))
        if not nodes:
            return NoNodeAlive()
        if not any(environment in node.environments for node in nodes):
            return EnvironmentNotBuilt(environment=environment)
        return None

    async def _made(self, job: JobRow) -> bytes:
        """Run the job and return what it wrote."""
        async with self._database.writing() as session:
            await store.insert(session, [job])
        self._notifier.notify(job.id)
        ended = False
        try:
            async with (
                asyncio.timeout(PATIENCE_SECONDS),
                aclosing(self._streams.follow(job.id, StreamPosition(), database_seconds=_LOOK_SECONDS)) as items,
            ):
                async for item in items:
                    ended = ended or item.name == "end"
        except TimeoutError as error:
            raise PreviewTookTooLong(job=job.id, seconds=PATIENCE_SECONDS) from error
        finally:
            if not ended:
                await cancel_abandoned(self._database, self._notifier, job.id, now=self._clock())
        async with self._database.reading() as session:
            row = await store.get(session, job.id)
        if row.status is not JobStatus.SUCCEEDED:
            detail = row.reason_params.get("detail") or row.reason
            raise PreviewFailed(job=job.id, detail=detail)
        return await asyncio.to_thread(_read, RunFolder(self._home.run_folder(row.id, row.attempts)).preview, job.id)

    def _answered(self, plan: _Plan, answer: bytes) -> Preview:
        """Return what the program answered; without its libraries, a user's own method has the rows as read. Blocks."""
        document = json.loads(answer)
        refused = document.get("refused")
        if refused is None:
            if document.get("lengths") is not None:
                self._lengths.keep(plan.lengths_key, Lengths.of(document["lengths"]))
            return replace(
                plan.preview,
                rows=storable_document(document["rows"]),
                tokenized=True,
                own_template=document["own_template"],
                turn_end=storable_document(document.get("turn_end")),
                lengths=self._lengths.find(plan.lengths_key),
            )
        if refused["code"] == _WITHOUT_TRANSFORMERS and not plan.preview.exact:
            return _as_read(plan)
        code = refused["code"]
        raise InvalidRequest([Violation(_POINTERS.get(code, "/dataset"), code, refused["params"])])


class _Answers:
    """Remembers answers; the least recently used ones make way."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        """Return the answer of this key. None: it is not remembered."""
        if key in self._by_key:
            self._by_key.move_to_end(key)
        return self._by_key.get(key)

    def keep(self, key: str, answer: bytes) -> None:
        """Remember an answer."""
        self._by_key[key] = answer
        while sum(map(len, self._by_key.values())) > _REMEMBERED_BYTES:
            self._by_key.popitem(last=False)


def _training_stage(method: Method) -> Stage:
    """Return the stage that learns from the data set: the first of the method's path."""
    lifecycle = list(method.definition.lifecycle or ())
    return chain(lifecycle, lifecycle[-1], with_training=method.definition.stage_config(JobKind.TRAINING) is not None)[
        0
    ]


def _as_read(plan: _Plan) -> Preview:
    """Return the rows without tokens. Blocks."""
    wanted = None if plan.rows is None else wanted_of(plan.rows.model_dump())
    limit = -1 if plan.rows is None else plan.rows.limit
    try:
        rows = preview(plan.jsonl, wanted, plan.lines, limit=limit)
    except Refused as error:
        raise InvalidRequest([Violation("/dataset", "dataset_rows_unreadable", {"reason": str(error)})]) from error
    return replace(plan.preview, rows=storable_document(rows))


def _read(path: Path, job_id: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ANSWER_BYTES + 1)
    except OSError as error:
        raise PreviewFailed(job=job_id, detail=str(error)) from error
    if len(content) > MAX_ANSWER_BYTES:
        raise PreviewFailed(job=job_id, detail=f"{len(content)} bytes")
    return content
