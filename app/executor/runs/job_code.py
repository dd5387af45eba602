"""The code that a job runs, as a second person approves it (`app.domain.code_review`)."""

from collections.abc import Sequence

from app.domain.code_review import Code
from app.domain.kinds import STAGES
from app.domain.stage_calls import StageCall
from app.executor.runs.job_spec import JobSpec, PinnedScript
from app.registry.methods.code_reviews import code_of
from app.registry.methods.pins import PinnedFile
from app.registry.methods.runs import FILE_PARAMETERS
from app.store.tables import JobRow


def codes_of_job(job: JobRow) -> dict[str, Code]:
    """Return the code of the job's stage, and of the files that its parameters name; none if a program of ours runs."""
    if job.kind not in STAGES:
        return {}
    spec = JobSpec.of(job)
    files = {name: code_of(_pinned(file), StageCall()) for name, file in spec.files.items()}
    return {job.kind.value: code_of(_pinned(spec.script), spec.call), **files}


def unpinned_files(spec: JobSpec) -> Sequence[str]:
    """Return the parameters that name a file of code whose bytes the job does not pin."""
    given = [name for name, value in spec.effective.items() if value]
    if spec.runner_call is not None:  # the script is given the words as they are
        words = spec.runner_call.arguments
        given += [*spec.runner_call.parameters, *(word[2:].partition("=")[0] for word in words if word[:2] == "--")]
    return [
        whole
        for whole in FILE_PARAMETERS
        if (whole in given and whole not in spec.files) or any(_abbreviates(name, whole, spec) for name in given)
    ]


def _abbreviates(name: str, whole: str, spec: JobSpec) -> bool:
    """Say whether the script takes `name` for the beginning of `whole`, as argparse does."""
    declared = spec.declared or ()
    return name != whole and whole.startswith(name) and whole in declared and name not in declared


def _pinned(script: PinnedScript | None) -> PinnedFile | None:
    return None if script is None else PinnedFile(**script.model_dump())
