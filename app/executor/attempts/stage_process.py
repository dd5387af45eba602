"""The process of a stage: its command, variables, files and working directory.

Everything is decided here from values, for the launch of an attempt and for those who want to see it before.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

import yaml

from app.domain.errors import Violation
from app.domain.launchers import GROUP_KINDS, accelerate_config
from app.domain.stage_calls import WorkingDirectory
from app.executor.attempts.launchers import group_variables, stage_command, usable_cores
from app.executor.attempts.stage_arguments import Folders, Inputs, call_stage, dataset_links
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.run_folder import RunFolder
from app.presets.catalogue import helpers_dir
from app.presets.shared.helpers.deepe_loading import PERMITS
from app.registry.methods.runs import ScriptToRun
from app.store.tables import JobRow


@dataclass(frozen=True)
class Place:
    """Where a stage runs. `script` None: it is a module of the environment.

    `accelerators`: how many the attempt holds. `variables` are of the node: which accelerators are seen, where to go on
    from. `inherited` is the environment that the stage has without all this.
    """

    python: Path
    script: ScriptToRun | None
    run: RunFolder
    script_root: Path
    output: Path
    accelerators: int
    grace_seconds: float
    redis_url: str | None
    variables: Mapping[str, str] = field(default_factory=dict)
    inherited: Mapping[str, str] = field(default_factory=dict)

    @property
    def isolated(self) -> bool:
        """Whether the stage sees no modules of the folder that it works in."""
        return self.script is None or self.script.isolated

    @property
    def import_paths(self) -> Sequence[Path]:
        """Where the stage's modules are looked for behind its own folder; users' copies of helpers before ours."""
        if self.script is None:
            return [helpers_dir()]
        return [*self.script.import_paths, *([self.run.helpers] if self.script.helper_copies else []), helpers_dir()]


@dataclass(frozen=True)
class StageProcess:
    """What is started. `variables` come on top of the environment's; `files` are written before, `links` are made."""

    argv: tuple[str, ...]
    working_directory: Path
    variables: Mapping[str, str]
    files: Mapping[Path, str]
    notes: Sequence[Violation]
    links: Mapping[Path, Path]


class ConfigNotWritable(Exception):
    """The configuration file's format has no form for a value."""


def stage_process(job: JobRow, spec: JobSpec, inputs: Inputs, place: Place) -> StageProcess:
    """Return the process of a stage; nothing is written. Raises what `call_stage` does, and `ConfigNotWritable`."""
    left = spec.server.accelerators if spec.server is not None else 0
    run = place.run
    processes = spec.launcher.count(max(0, place.accelerators - left), group=spec.strategy is not None)
    working = _working_directory(spec, place)
    folders = Folders(place.script_root, run.path, working)
    called = call_stage(job, spec, inputs, folders)
    settings = spec.deployment.settings if spec.deployment is not None else {}
    files = {run.parameters: json.dumps({**settings, **spec.effective})}
    if spec.call.config is not None and called.config is not None:
        files[run.path / spec.call.config.name] = config_text(spec.call.config.name, called.config)
    links = dataset_links(spec, inputs, folders)
    # no other job has this path: what is prepared of it goes with the job
    prepared = {"HF_DATASETS_CACHE": str(run.cache / "datasets")} if links else {}
    variables = {
        **{name: value for name, value in prepared.items() if name not in place.inherited},
        **called.variables,
        "PYTHONPATH": os.pathsep.join(map(str, place.import_paths)),
        # what the folder that it works in holds is none of its modules
        **({"PYTHONSAFEPATH": "1"} if place.isolated else {}),
        "DEEPE_JOB_ID": job.id,
        "DEEPE_OUTPUT_DIR": str(place.output),
        "DEEPE_CACHE_DIR": str(run.cache),
        "DEEPE_PARAMS": str(run.parameters),
        **({PERMITS: ",".join(spec.permits)} if spec.permits is not None else {}),
        "DEEPE_EVENTS": str(run.events),
        **({"DEEPE_MODEL_PATH": str(inputs.model)} if inputs.model is not None else {}),
        **status_variables(place.redis_url),
        **place.variables,
    }
    config = None
    if spec.strategy is not None:
        config = run.accelerate_config
        files[config] = yaml.safe_dump(dict(accelerate_config(spec.strategy, processes)), sort_keys=False)
    if config is not None or spec.launcher.kind in GROUP_KINDS:
        known = {**place.inherited, **variables}
        variables |= group_variables(
            known, processes=processes, grace_seconds=place.grace_seconds, cores=usable_cores()
        )
    argv = stage_command(
        spec.launcher,
        python=place.python,
        target=_target(spec, place),
        arguments=called.arguments,
        processes=processes,
        ranks=run.ranks,
        config=config,
    )
    return StageProcess(argv, working, variables, files, called.notes, links)


def _target(spec: JobSpec, place: Place) -> tuple[str, ...]:
    """Return what is run: a module of the environment, one of the pinned tree, or a file."""
    if place.script is None:
        return "-m", spec.call.module or ""
    if spec.script is not None and spec.script.module is not None:
        return "-m", spec.script.module
    return (str(place.script.path),)


def config_text(name: str, content: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return the content of a configuration file in the format that its name says."""
    try:
        if name.endswith(".toml"):
            import tomli_w

            return tomli_w.dumps(dict(content))
        if name.endswith(".json"):
            return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigNotWritable(f"{name}: {error}") from error


def _working_directory(spec: JobSpec, place: Place) -> Path:
    match spec.call.working_directory:
        case WorkingDirectory.SCRIPTS:
            return place.script_root
        case WorkingDirectory.METHOD:
            return place.script_root if place.script is None else place.script.path.parent
        case WorkingDirectory.RUN:
            return place.run.path
        case _:
            assert_never(spec.call.working_directory)


def status_variables(redis_url: str | None) -> dict[str, str]:
    """Return the variables by which scripts find the Redis of their status keys (loopback or cluster TCP)."""
    if redis_url is None:
        return {}
    address = urlsplit(redis_url)
    if address.scheme == "unix":
        return {}
    port = str(address.port or 6379)
    return {
        "AI_PY_REDIS_HOST": address.hostname or "127.0.0.1",
        "AI_PY_REDIS_START_PORT": port,
        "AI_PY_REDIS_EXPOSED_PORT": port,
    }
