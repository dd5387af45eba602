"""The first question to a model is compared with its base model's answer, which nobody waits for."""

from collections.abc import Sequence
from typing import Any

from sqlmodel import col, select

from app.domain.enums import JobKind, JobStatus
from app.domain.transitions import TERMINAL
from app.executor.runs.job_spec import InferenceRequest, JobSpec, is_comparison
from app.store import job_status
from app.store.clock import database_now
from app.store.tables import JobRow
from tests.waiting import until
from tests.worker.harness import Site

ARGUMENTS = """
import argparse, json, os, pathlib, play
parser = argparse.ArgumentParser()
for name in ("model_path", "base_model_path", "top_k", "model_id", "max_length"):
    parser.add_argument("--" + name)
given, _ = parser.parse_known_args()
def answer(text):
    print(json.dumps({"status": "resp", "text": text}))
"""
IGNORES = f"{ARGUMENTS}answer('I know ' + pathlib.Path(given.base_model_path).name)\n"
READS = f"{ARGUMENTS}answer('I know ' + pathlib.Path(given.model_path).name)\n"
LOADS = f"{ARGUMENTS}open(os.path.join(given.model_path, 'adapter_config.json'))\nanswer('I know')\n"
SAMPLES = f"{ARGUMENTS}answer('I know ' + (os.urandom(8).hex() if given.top_k != '1' else ''))\n"
SILENT = f"{ARGUMENTS}\n"
WAITS = f"{ARGUMENTS}answer('I know')\nplay.journal('asked')\nif given.top_k == '1': play.wait_for('never')\n"
QUESTION = InferenceRequest(prompt="What do you know?", history=(), session_id="s", max_length=512)


class TestFirstQuestion:
    async def test_tells_scripts_that_answer_as_the_base_model_does(self, any_site: Site) -> None:
        site = any_site
        training = await site.submit()
        site.start_worker()
        await site.wait(training, JobStatus.SUCCEEDED)
        model = (await site.models())[training].id

        alike: dict[str, Any] = {}
        for text in (IGNORES, READS, LOADS, SAMPLES, SILENT):
            question, compared = await asked(site, model, text)
            kept = (await site.models())[training].details["comparison"]
            told = (await site.row(question)).reason_params.get("answers_as_base")
            assert (told is not None) == (kept["alike"] is True)
            assert [is_comparison(job) for job in compared] == [True, True]
            assert all(job.status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED) for job in compared)
            alike[text] = kept["alike"]

        assert alike == {IGNORES: True, READS: False, LOADS: None, SAMPLES: True, SILENT: False}
        of_base, of_model = (JobSpec.of(job).question for job in compared)
        assert of_base is not None
        assert of_model is not None
        assert (of_base.prompt, of_base.top_k, of_base.max_length) == (QUESTION.prompt, 1, 64)
        assert of_base.session_id != of_model.session_id != QUESTION.session_id

    async def test_is_compared_once_and_gives_way_to_the_next(self, site: Site) -> None:
        training = await site.submit()
        site.start_worker()
        await site.wait(training, JobStatus.SUCCEEDED)
        model = (await site.models())[training].id
        first = await ask(site, model, WAITS)
        await site.wait(first, JobStatus.SUCCEEDED)
        waiting = await compared_with(site, first)
        await site.wait(waiting[0].id, JobStatus.RUNNING)

        async with site.database.writing() as session:
            given_way = await job_status.cancel_comparisons(session, now=await database_now(session))
        second = await ask(site, model, IGNORES)
        await site.wait(second, JobStatus.SUCCEEDED)
        ended = await site.wait_for_end(*given_way)
        await until(lambda: ended_of(site, second), "the comparison of the second question")
        third = await ask(site, model, IGNORES)
        await site.wait(third, JobStatus.SUCCEEDED)

        assert [job.id for job in ended] == [job.id for job in waiting]
        assert {job.status for job in ended} == {JobStatus.CANCELLED}
        assert (await site.models())[training].details["comparison"]["alike"] is True
        assert await compared_with(site, third) == []

    async def test_is_not_compared_where_that_is_switched_off(self, site: Site) -> None:
        training = await site.submit()
        site.start_worker(DEEPE_COMPARE_ANSWERS="false")
        await site.wait(training, JobStatus.SUCCEEDED)
        model = (await site.models())[training].id

        question = await ask(site, model, IGNORES)
        await site.wait(question, JobStatus.SUCCEEDED)

        assert await compared_with(site, question) == []
        assert "comparison" not in (await site.models())[training].details


async def ask(site: Site, model: str, text: str) -> str:
    """Ask the model with this script, as a person does."""
    name = f"ask-{abs(hash(text))}.py"
    kind = JobKind.INFERENCE_CUSTOMIZED
    return await site.submit(text, kind, file=name, spec={"question": QUESTION}, model_id=model, priority=-10)


async def asked(site: Site, model: str, text: str) -> tuple[str, Sequence[JobRow]]:
    """Ask, and wait for the end of the comparison; return the question's job, and those of the comparison."""
    question = await ask(site, model, text)
    await site.wait(question, JobStatus.SUCCEEDED)
    return question, await until(lambda: ended_of(site, question), "the comparison")


async def ended_of(site: Site, question: str) -> Sequence[JobRow] | None:
    """Return the jobs of a question's comparison once they have ended."""
    found = await compared_with(site, question)
    return found if found and all(job.status in TERMINAL for job in found) else None


async def compared_with(site: Site, question: str) -> Sequence[JobRow]:
    """Return the jobs of the comparison that followed a question."""
    async with site.database.reading() as session:
        rows = (await session.exec(select(JobRow).order_by(col(JobRow.position)))).all()
    return [job for job in rows if (job.launch.get("comparison") or {}).get("question") == question]
