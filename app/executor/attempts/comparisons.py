"""Compare what a model answers with what its base model answers, in the background, after the first question.

A script that reads no adapter answers with the base model, and its answers look like any other. So the first question
to a model is asked twice more: of the base model in place of the model, and, if that gave an answer, of the model as it
was asked, both with the most likely token at each step. The same text is a warning. Everything else says nothing: a
comparison that fails, or that gives way to a person's next question, ends as cancelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from uuid import uuid4

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.demand import COMPARISON_PRIORITY
from app.domain.enums import EndReason, JobStatus
from app.domain.errors import Violation
from app.domain.kinds import KINDS
from app.domain.retries import Limits
from app.domain.training_types import TYPES, InferenceForm
from app.domain.transitions import TERMINAL
from app.executor.runs.inference_protocol import AnswerChunk, InferenceParser
from app.executor.runs.job_spec import Comparison, JobSpec, is_comparison
from app.store import jobs as store
from app.store import models
from app.store.job_status import End
from app.store.tables import JobRow, ModelRow

_MAX_TRIES: Final = 3
_MAX_TOKENS: Final = 64
_MAX_SECONDS: Final = 900.0
_MAX_CHARACTERS: Final = 4000  # kept of an answer


@dataclass(frozen=True)
class Compared:
    """What is kept with a model of its comparison. `alike`: None while it is not known."""

    script: str
    """Digest of the file that was asked, or the name of the module."""
    file: str
    job: str
    """The first job of the newest try."""
    tries: int
    alike: bool | None = None

    @classmethod
    def of(cls, model: ModelRow) -> "Compared | None":
        """Return what is kept with a model; None: nothing yet."""
        kept = model.details.get("comparison")
        return None if kept is None else cls(**kept)

    def keep(self, model: ModelRow) -> None:
        """Keep it with the model."""
        model.details = {**model.details, "comparison": dict(vars(self))}


def answer_of(lines: Sequence[str]) -> str:
    """Return the answer that an inference script printed."""
    parser = InferenceParser()
    events = [*parser.feed("".join(f"{line}\n" for line in lines)), *parser.close()]
    return "".join(event.text for event in events if isinstance(event, AnswerChunk)).strip()[:_MAX_CHARACTERS]


def quiet(job: JobRow, end: End) -> End:
    """Return the end of a job; a comparison that failed is cancelled, since nobody asked for it."""
    if not is_comparison(job) or end.status is not JobStatus.FAILED:
        return end
    return replace(end, status=JobStatus.CANCELLED, reason=EndReason.CANCELLED)


def answer_warnings(file: str | None) -> list[Violation]:
    """Return what to say of answers that are those of the base model; `file` is the script, None: they are not."""
    return [] if file is None else [Violation("", "answers_as_base_model", {"file": file})]


async def after(session: AsyncSession, job: JobRow, end: End, *, now: datetime) -> None:
    """Write what follows from the end of a question: its comparison, or what a comparison found."""
    if end.status is not JobStatus.SUCCEEDED or not KINDS[job.kind].is_inference or job.model_id is None:
        return
    spec = JobSpec.of(job)
    if spec.comparison is None:
        await _begin(session, job, spec, now=now)
    elif not spec.comparison.base:
        await _record(session, job, spec.comparison, end)


async def _begin(session: AsyncSession, job: JobRow, spec: JobSpec, *, now: datetime) -> None:
    """Insert the jobs of a comparison if the model has none yet that says something of the script as it is."""
    if spec.question is None or spec.runner_call is not None or (spec.script is not None and spec.script.shipped):
        return  # the product's own scripts read the model, as its tests show
    if TYPES[spec.training_type].inference_form is not InferenceForm.TEXT:
        return
    assert job.model_id is not None
    model = await models.find_model(session, job.model_id, lock=True)
    if model is None or model.deleted_at is not None:
        return
    script = spec.script.sha256 if spec.script is not None else spec.call.module or ""
    kept = Compared.of(model)
    if kept is not None and kept.script == script:
        if kept.alike is not None or kept.tries >= _MAX_TRIES:
            return
        if any(one.status not in TERMINAL for one in await store.chain_of(session, [kept.job])):
            return
    made = _jobs(job, spec, now=now)
    tries = kept.tries + 1 if kept is not None and kept.script == script else 1
    file = spec.script.file if spec.script is not None else spec.call.module or ""
    Compared(script=script, file=file, job=made[0].id, tries=tries).keep(model)
    await store.insert(session, made)


def _jobs(job: JobRow, spec: JobSpec, *, now: datetime) -> list[JobRow]:
    """Return the question to the base model, and the question to the model that waits for it."""
    assert spec.question is not None
    shorter = min(spec.question.max_length, _MAX_TOKENS)
    made: list[JobRow] = []
    for base in (True, False):
        job_id = str(uuid4())
        # only the most likely token is left of the top 1, whatever the temperature and the seed
        question = spec.question.model_copy(update={"session_id": job_id, "max_length": shorter, "top_k": 1})
        comparison = Comparison(question=job.id, base=base)
        made.append(
            store.new_job(
                id=job_id,
                kind=job.kind,
                name=job.name,
                environment=job.environment,
                launch=spec.model_copy(update={"question": question, "comparison": comparison}).document(),
                now=now,
                position=len(made),
                priority=COMPARISON_PRIORITY,
                limits=Limits(seconds=_MAX_SECONDS).model_dump(mode="json", exclude_none=True),
                resources=job.resources,
                method_id=job.method_id,
                method_name=job.method_name,
                method_version=job.method_version,
                base_model_id=job.base_model_id,
                model_id=job.model_id,
                project_id=job.project_id,
            )
        )
    store.link(made)
    return made


async def _record(session: AsyncSession, job: JobRow, comparison: Comparison, end: End) -> None:
    assert job.model_id is not None
    model = await models.find_model(session, job.model_id, lock=True)
    of_base = await store.get(session, job.chain_id)
    kept = Compared.of(model) if model is not None else None
    if model is None or kept is None or kept.job != of_base.id:
        return  # another script is asked by now
    answers = {end.params.get("answer"), of_base.reason_params.get("answer")}
    kept = replace(kept, alike=len(answers) == 1 and all(answers))
    kept.keep(model)
    if kept.alike:
        question = await store.get(session, comparison.question)
        question.reason_params = {**question.reason_params, "answers_as_base": kept.file}
