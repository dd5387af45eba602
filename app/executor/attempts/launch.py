"""Make the launch of an attempt concrete: which interpreter, which arguments, which environment, which folders.

The decision (`stage_process`) takes values only; `StageLauncher` fetches what it needs and writes the run folder.
"""

import asyncio
import contextlib
import copy
import errno
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from app.access.secrets import SecretKeys, SecretsKeyUnusable, SecretUnreadable, secret_values
from app.domain.accelerators import Accelerator
from app.domain.allow_lists import AllowList
from app.domain.enums import EndReason, JobKind
from app.domain.errors import AppError
from app.domain.kinds import KINDS, AcceleratorUse
from app.domain.plain_text import storable_document
from app.domain.projects import DEFAULT_SCOPE, Scope
from app.domain.secret_references import references, with_values
from app.executor.attempts.checkpoints import Checkpoint, hand_on, newest_checkpoint
from app.executor.attempts.pinning import pinned
from app.executor.attempts.script_status import ScriptStatus
from app.executor.attempts.stage_arguments import Inputs, ParametersLost
from app.executor.attempts.stage_process import ConfigNotWritable, Place, stage_process
from app.executor.attempts.stage_sandbox import ContainedNode, StageFiles, contained, contained_command
from app.executor.engines.base import LaunchSpec
from app.executor.environments.activation import (
    ActivationFailed,
    builder_environment,
    inherited_variables,
    interpreter,
    network_variables,
    stage_environment,
)
from app.executor.runs.job_code import codes_of_job, unpinned_files
from app.executor.runs.job_spec import EnvironmentBuild, JobSpec, Named, status_key
from app.executor.runs.redaction import begin, finish
from app.executor.runs.run_folder import RunFolder
from app.presets.catalogue import download_program, helpers_dir, preview_program, sample_base_model
from app.presets.shared.helpers.deepe_addresses import POLICY, AddressPolicy
from app.presets.shared.helpers.deepe_loading import PERMITS
from app.registry.base_models.uploads import FOLDER as UPLOADS
from app.registry.methods.code_reviews import CodeReviews
from app.registry.methods.files import MethodFiles
from app.registry.methods.pins import PinnedFile
from app.registry.methods.runs import ScriptToRun, script_to_run
from app.registry.scripts.root import ScriptRoot
from app.registry.scripts.versions import VersionStore
from app.store.allow_lists import of_environments
from app.store.home import Home
from app.store.job_attempts import Claim, record_resume
from app.store.models import find_model
from app.store.session import Database
from app.store.tables import BaseModelRow, JobRow, ModelRow

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LaunchError(Exception):
    """The attempt cannot run; `reason` and `params` become the end of its job."""

    def __init__(self, reason: EndReason, **params: Any) -> None:
        self.reason = reason
        self.params: dict[str, Any] = storable_document(params)  # paths and variables stand in them
        super().__init__(f"{reason}: {self.params}")


@contextlib.contextmanager
def ending_on_disk_errors() -> Iterator[None]:
    """End the job on an error of the disk, instead of trying for ever."""
    try:
        yield
    except OSError as error:
        reason = EndReason.DISK_FULL if error.errno in _FULL else EndReason.SPAWN_FAILED
        raise LaunchError(reason, detail=str(error)) from error


class Prefixes(Protocol):
    """Knows where the environments of this node are."""

    async def prefix(self, name: str) -> Path | None: ...

    def build_command(
        self, build: EnvironmentBuild, *, archive: Path, spec_file: Path | None, lock_file: Path | None
    ) -> list[str]: ...

    @property
    def accelerators(self) -> Sequence[Accelerator]: ...

    async def accelerator_with_most_memory(self) -> Accelerator | None: ...


class StageLauncher:
    """Resolves claims of one node to launch specs."""

    def __init__(
        self,
        *,
        database: Database,
        home: Home,
        prefixes: Prefixes,
        status: ScriptStatus,
        environ: Mapping[str, str],
        variables: Sequence[str] = (),
        redis_url: str | None,
        runner_port: int | None = None,
        grace_seconds: float,
        secrets_key: str | None = None,
        target_addresses: str = AddressPolicy.ANY,
        containment: ContainedNode | None = None,
    ) -> None:
        self._containment = containment
        self._database = database
        self._secret_keys = SecretKeys(home.secrets_key, secrets_key)
        self._prefixes = prefixes
        self._status = status
        self._environ = environ
        self._variables = tuple(variables)
        self._inherited_references = frozenset(references(inherited_variables(environ, also=self._variables)))
        self._redis_url = redis_url
        # where scripts of DeepExtension find its runner
        self._runner = {"TRAINING_START_PORT": str(runner_port)} if runner_port is not None else {}
        self._addresses = {POLICY: target_addresses}
        self._grace_seconds = grace_seconds
        self._keep_to(home)
        self._of_projects = {home.project: self}

    def _keep_to(self, home: Home) -> None:
        self._home = home
        self._files = MethodFiles(ScriptRoot(home.scripts), VersionStore(home.versions, beside=home.base))
        self._reviews = CodeReviews(self._files)

    def _of(self, project: str) -> "StageLauncher":
        """Return the launcher for the folders of a project."""
        if project not in self._of_projects:
            other = copy.copy(self)
            other._keep_to(self._home.of(project))
            self._of_projects[project] = other
        return self._of_projects[project]

    async def resolve(self, claim: Claim) -> LaunchSpec:
        """Return what to run for the claim, with its run folder made; raise `LaunchError` when it cannot run."""
        return await self._of(claim.job.project_id)._resolve(claim)

    async def _resolve(self, claim: Claim) -> LaunchSpec:
        run = RunFolder(self._home.run_folder(claim.job.id, claim.attempt.number))
        match claim.job.kind:
            case JobKind.ENVIRONMENT:
                resolve = self._resolve_build
            case JobKind.BASE_MODEL:
                resolve = self._resolve_base_model
            case JobKind.PREVIEW:
                resolve = self._resolve_preview
            case _:
                return await self._resolve_stage(claim, run)
        await asyncio.to_thread(_make_output, run)
        spec = await resolve(claim, run)
        values = await self._secret_values(references(dict(spec.env)), DEFAULT_SCOPE)
        await asyncio.to_thread(_hide, run, values.values())
        return replace(spec, env=with_values(dict(spec.env), values), private=bool(values))

    async def launched(self, claim: Claim, pid: int) -> None:
        """Tell DeepExtension's backend the pid of the training that runs now."""
        key = status_key(claim.job)
        if key is not None and KINDS[claim.job.kind].reports_pid:
            await self._status.running(key, pid)

    async def _resolve_stage(self, claim: Claim, run: RunFolder) -> LaunchSpec:
        job, spec = claim.job, _spec(claim.job)
        # at once, and one visit to a thread: each would be another wait before the start
        names = references(list(spec.referring().values()))
        spec, (secrets, inherited), prefix, server, (model, judge), seen = await asyncio.gather(
            self._approved(job, spec),
            asyncio.gather(
                self._secret_values(names, Scope(job.project_id)),
                # what an operator gives to every stage of a node is of no project
                self._secret_values(self._inherited_references, DEFAULT_SCOPE),
            ),
            self._prefix(job.environment),
            self._server_prefix(spec),
            asyncio.gather(self._model(job.model_id), self._reward_model(spec)),
            self._seen(claim),
        )
        launch, checkpoint = await asyncio.to_thread(
            self._lay_out, claim, spec, secrets, inherited, run, prefix, server, model, seen, judge
        )
        if checkpoint is not None:
            async with self._database.writing() as session:
                await record_resume(session, claim, checkpoint.record())
        if (key := status_key(job)) is not None:
            await self._status.launching(key)
        return launch

    async def _approved(self, job: JobRow, spec: JobSpec) -> JobSpec:
        await self._require_permission(job, spec)
        return await self._with_dtype(spec)

    async def _require_permission(self, job: JobRow, spec: JobSpec) -> None:
        """Raise `LaunchError` for an environment that the job may not use, and for code that is not approved.

        Such code waits for a review from now on, where approval is required.

        The claim is committed: whoever withdraws the approval from now on sees the job among those that have started.
        """
        database = self._database.of(Scope(job.project_id))
        async with database.reading() as session:
            rules = await of_environments(session)
            for environment in [job.environment, *([spec.server.environment] if spec.server is not None else [])]:
                allowed = rules.get(environment, AllowList())
                if not allowed.permits(
                    job.kind, method_id=job.method_id, project_id=job.project_id, environment=environment
                ):
                    raise LaunchError(EndReason.ENVIRONMENT_NOT_ALLOWED, environment=environment)
            if not await self._reviews.is_required(session):
                return
            codes = codes_of_job(job)
            states = await self._reviews.unapproved(session, codes, lock=True)
        if unpinned := unpinned_files(spec):
            raise LaunchError(EndReason.CODE_NOT_APPROVED, code=", ".join(unpinned))
        if states:
            missing = {stage: codes[stage] for stage in states}
            async with database.writing() as session:
                method = await self._reviews.version_of(session, job.method_id, job.method_version)
                await self._reviews.wait_for(session, missing, method)
            named = ", ".join(f"{stage} {code.name} {code.digest}" for stage, code in missing.items())
            raise LaunchError(EndReason.CODE_NOT_APPROVED, code=named)

    def _lay_out(
        self,
        claim: Claim,
        spec: JobSpec,
        secrets: Mapping[str, str],
        inherited: Mapping[str, str],
        run: RunFolder,
        prefix: Path,
        server: Path | None,
        model: ModelRow | None,
        seen: Sequence[str],
        judge: Sequence[Path],
    ) -> tuple[LaunchSpec, Checkpoint | None]:
        """Write the run folder; return what to run in it, and the checkpoint that it goes on from."""
        job = claim.job
        _make_output(run)
        self._redact_earlier(claim)
        hidden = [*secrets.values(), *inherited.values()]
        _hide(run, hidden)
        with ending_on_disk_errors():
            script, spec = self._locate(spec), self._with_files(spec)
            if spec.script is not None and spec.script.module is not None and _is_before_3_11(prefix):
                detail = f"{spec.script.module}: an own module needs an environment with Python 3.11 or later"
                raise LaunchError(EndReason.SPAWN_FAILED, detail=detail)
            inputs = self._inputs(spec, model, run)
            checkpoint = self._newest_checkpoint(claim, spec) if KINDS[job.kind].has_checkpoints else None
            resume_from = hand_on(checkpoint, run.output) if checkpoint is not None else None
            if script is not None:
                _link_helper_copies(script, run)
        env: dict[str, str] = with_values(self._activated(prefix, {}), inherited)
        place = Place(
            python=interpreter(prefix),
            script=script,
            run=run,
            script_root=self._home.scripts,
            output=self._output(spec, run),
            accelerators=len(claim.attempt.accelerators),
            grace_seconds=self._grace_seconds,
            redis_url=self._redis_url,
            variables={
                **self._runner,
                **self._addresses,
                **({"DEEPE_RESUME_FROM": str(resume_from)} if resume_from is not None else {}),
                **({"DEEPE_SERVER_PYTHON": str(interpreter(server))} if server is not None else {}),
                **pinned(seen, self._prefixes.accelerators),
            },
            inherited=env,
        )
        try:
            process = stage_process(job, spec.with_secrets(secrets) if secrets else spec, inputs, place)
        except AppError as error:
            raise LaunchError(EndReason.SPAWN_FAILED, detail=error.detail()) from error
        except (ParametersLost, ConfigNotWritable) as error:
            raise LaunchError(EndReason.SPAWN_FAILED, detail=str(error)) from error
        with ending_on_disk_errors():
            for path, content in process.files.items():
                if hidden:
                    path.touch(mode=0o600)
                path.write_text(content, "utf-8")
            for link, target in process.links.items():
                link.parent.mkdir(exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    link.symlink_to(target)
            argv = process.argv
            if (node := self._containment) is not None:
                files = StageFiles(
                    inputs,
                    prefixes=[each for each in (prefix, server) if each is not None],
                    more=judge,
                )
                sandbox = contained(node, self._home, claim.attempt.id, job, spec, place, files)
                argv = contained_command(node, self._home, sandbox, process, run)
        launch = LaunchSpec(
            attempt_id=claim.attempt.id,
            argv=argv,
            cwd=process.working_directory,
            env={**env, **process.variables},
            output=run.output_log,
            grace_seconds=self._grace_seconds,
            private=bool(hidden),
            sandboxed=self._containment is not None,
        )
        return launch, checkpoint

    async def _secret_values(self, names: Iterable[str], scope: Scope) -> Mapping[str, str]:
        """Return the values of a project's secrets, in memory only; raise `LaunchError` for one that cannot be had."""
        wanted = frozenset(names)
        if not wanted:
            return {}
        try:
            async with self._database.of(scope).reading() as session:
                found = await secret_values(session, self._secret_keys, wanted)
        except (SecretUnreadable, SecretsKeyUnusable) as error:
            raise LaunchError(EndReason.SECRET_UNREADABLE, detail=str(error)) from error
        if missing := sorted(wanted - found.keys()):
            raise LaunchError(EndReason.SECRET_MISSING, secrets=", ".join(missing))
        return found

    def _redact_earlier(self, claim: Claim) -> None:
        """Redact what attempts left whose node was lost before it did so itself."""
        for number in range(1, claim.attempt.number):
            with contextlib.suppress(OSError):
                finish(RunFolder(self._home.run_folder(claim.job.id, number)))

    def _output(self, spec: JobSpec, run: RunFolder) -> Path:
        """Return the folder that the script writes into: the caller's own if it named one."""
        named = spec.runner_call.output if spec.runner_call is not None else None
        return run.output if named is None else self._home.seen_by_scripts(named)

    def _newest_checkpoint(self, claim: Claim, spec: JobSpec) -> Checkpoint | None:
        found = newest_checkpoint(self._home, claim.job.id, before=claim.attempt.number)
        if found is None and spec.resume_of is not None:
            found = newest_checkpoint(self._home, spec.resume_of)
        return found

    async def _resolve_build(self, claim: Claim, run: RunFolder) -> LaunchSpec:
        build = _spec(claim.job).build
        assert build is not None
        spec_file = run.path / "environment.yml" if build.spec is not None else None
        lock_file = run.path / "environment-lock.json" if build.lock is not None else None
        with ending_on_disk_errors():
            if spec_file is not None and build.spec is not None:
                await asyncio.to_thread(spec_file.write_text, build.spec, "utf-8")
            if lock_file is not None and build.lock is not None:
                await asyncio.to_thread(lock_file.write_text, build.lock.model_dump_json(), "utf-8")
        command = self._prefixes.build_command(
            build, archive=self._home.environments, spec_file=spec_file, lock_file=lock_file
        )
        return LaunchSpec(
            attempt_id=claim.attempt.id,
            argv=(sys.executable, "-u", "-m", *command),
            cwd=Path(__file__).parents[3],
            env=builder_environment(self._environ) | {"DEEPE_EVENTS": str(run.events)},
            output=run.output_log,
            grace_seconds=self._grace_seconds,
        )

    async def _resolve_base_model(self, claim: Claim, run: RunFolder) -> LaunchSpec:
        """Run a sample's program, or a download. It puts the folder in its place as a whole or not at all."""
        spec = _spec(claim.job)
        assert spec.base_model is not None
        folder = self._home.absolute(spec.base_model.path)
        program, arguments = _program(spec, self._home)
        with ending_on_disk_errors():
            await asyncio.to_thread(folder.parent.mkdir, parents=True, exist_ok=True)
        command = (str(program), *arguments, "--output", str(folder))
        # a download goes through the proxy that installers use
        more = network_variables(self._environ) if spec.hub is not None else {}
        return await self._product_program(claim, run, command, cwd=program.parent, more=more)

    async def _resolve_preview(self, claim: Claim, run: RunFolder) -> LaunchSpec:
        """Run the program that shows what a training would learn of rows."""
        spec = _spec(claim.job)
        assert spec.preview is not None
        inputs = self._inputs(spec, None, run)
        request = run.path / "preview-request.json"
        document = {
            **spec.preview.model_dump(),
            "base_model": str(inputs.base_model),
            "data": str(inputs.dataset),
            "parameters": spec.effective,
        }
        with ending_on_disk_errors():
            await asyncio.to_thread(request.write_text, json.dumps(document), "utf-8")
        # where the training runs: parameters may be paths from there
        command = (str(preview_program()), str(request), str(run.preview))
        permits = {PERMITS: ",".join(spec.permits or ())}
        return await self._product_program(claim, run, command, cwd=self._home.scripts, more=permits)

    async def _product_program(
        self, claim: Claim, run: RunFolder, command: Sequence[str], *, cwd: Path, more: Mapping[str, str] | None = None
    ) -> LaunchSpec:
        """Run a program of the product in the job's environment; it holds no accelerator."""
        prefix = await self._prefix(claim.job.environment)
        extra = {
            "PYTHONPATH": str(helpers_dir()),
            "DEEPE_JOB_ID": claim.job.id,
            "DEEPE_EVENTS": str(run.events),
            **pinned([], self._prefixes.accelerators),
            **(more or {}),
        }
        return LaunchSpec(
            attempt_id=claim.attempt.id,
            argv=(str(interpreter(prefix)), "-u", *command),
            cwd=cwd,
            env=await asyncio.to_thread(self._activated, prefix, extra),
            output=run.output_log,
            grace_seconds=self._grace_seconds,
        )

    async def _prefix(self, environment: str) -> Path:
        prefix = await self._prefixes.prefix(environment)
        if prefix is None:
            raise LaunchError(EndReason.ENV_MISSING, environment=environment)
        return prefix

    async def _server_prefix(self, spec: JobSpec) -> Path | None:
        return await self._prefix(spec.server.environment) if spec.server is not None else None

    def _activated(self, prefix: Path, extra: Mapping[str, str]) -> dict[str, str]:
        try:
            return stage_environment(self._environ, prefix, extra, also=self._variables)
        except ActivationFailed as error:
            raise LaunchError(EndReason.SPAWN_FAILED, detail=str(error)) from error

    async def _with_dtype(self, spec: JobSpec) -> JobSpec:
        """Complete the precision of a base model that was not made yet when the job was submitted."""
        base = spec.base_model
        if base is None or base.dtype is not None:
            return spec
        async with self._database.reading() as session:
            row = await session.get(BaseModelRow, base.id)
        if row is None or row.path != base.path:
            return spec
        return spec.model_copy(update={"base_model": base.model_copy(update={"dtype": row.card.get("dtype")})})

    async def _reward_model(self, spec: JobSpec) -> Sequence[Path]:
        """Return the folders of the reward model: its own, and its base model's if it is an adapter."""
        if spec.reward_model is None or self._containment is None:
            return ()
        async with self._database.reading() as session:
            row = await session.get(ModelRow, spec.reward_model.id)
        paths = [spec.reward_model.path, *([row.base_model_path] if row is not None else [])]
        return [self._home.absolute(path) for path in paths if path]

    async def _seen(self, claim: Claim) -> Sequence[str]:
        """Return the accelerators that the stage sees. Questions hold none and share the one with most room."""
        if KINDS[claim.job.kind].accelerators is not AcceleratorUse.SHARED:
            return claim.attempt.accelerators
        shared = await self._prefixes.accelerator_with_most_memory()
        return [shared.id] if shared is not None else []

    def _locate(self, spec: JobSpec) -> ScriptToRun | None:
        """Return where the pinned bytes stand: in place while the script root still holds them. None for a module."""
        script = spec.script
        if script is None and spec.call.module is not None:
            return None
        assert script is not None
        try:
            return script_to_run(self._files, PinnedFile(**script.model_dump()))
        except AppError as error:
            raise LaunchError(EndReason.SCRIPT_MISSING, file=script.file, detail=error.detail()) from error

    def _with_files(self, spec: JobSpec) -> JobSpec:
        """Return the specification with the stored bytes of the files that parameters name."""
        if not spec.files:
            return spec
        try:
            placed = {
                name: str(script_to_run(self._files, PinnedFile(**one.model_dump())).path)
                for name, one in spec.files.items()
            }
        except AppError as error:
            raise LaunchError(EndReason.SCRIPT_MISSING, file=", ".join(spec.files), detail=error.detail()) from error
        return spec.model_copy(update={"effective": {**spec.effective, **placed}})

    async def _model(self, model_id: str | None) -> ModelRow | None:
        if model_id is None:
            return None
        async with self._database.reading() as session:
            model = await find_model(session, model_id)
        if model is None or model.deleted_at is not None:
            raise LaunchError(EndReason.INPUT_MISSING, detail=f"model {model_id}")
        return model

    def _inputs(self, spec: JobSpec, model: ModelRow | None, run: RunFolder) -> Inputs:
        base, data = spec.base_model, spec.dataset
        asked: ModelRow | Named | None = model
        if spec.comparison is not None and spec.comparison.base:
            asked = base
        rows = self._home.absolute(data.path) if data else None
        if spec.runner_call is not None and (named := spec.runner_call.platform.get("dataset_path")):
            rows = Path(named) if Path(named).is_file() else None  # what a caller names is the script's business
        inputs = Inputs(
            base_model=self._home.absolute(base.path) if base else None,
            dataset=rows,
            model=self._home.absolute(asked.path) if asked is not None and asked.path else None,
            model_name=asked.name if asked is not None else "",
            output=run.output,
            validation=self._home.absolute(spec.validation_dataset.path) if spec.validation_dataset else None,
        )
        judge = self._home.absolute(spec.reward_model.path) if spec.reward_model else None
        for path in (inputs.base_model, inputs.dataset, inputs.model, inputs.validation, judge):
            if path is not None and not path.exists():
                raise LaunchError(EndReason.INPUT_MISSING, detail=self._home.relative(path))
        return inputs


def _make_output(run: RunFolder) -> None:
    with ending_on_disk_errors():
        run.output.mkdir(parents=True, exist_ok=True)


def _hide(run: RunFolder, values: Collection[str]) -> None:
    """Keep secrets from the readers of the run folder, before a script is given them."""
    if values:
        with ending_on_disk_errors():
            begin(run, values)


def _is_before_3_11(prefix: Path) -> bool:
    """Say whether `python -m` of an environment looks in the working directory before the pinned tree."""
    version = re.fullmatch(r"python3\.(\d+)", interpreter(prefix).resolve().name)
    return version is not None and int(version[1]) < 11


def _link_helper_copies(script: ScriptToRun, run: RunFolder) -> None:
    """Link users' copies of helper modules into the run folder, so that the rest of their folder is not visible."""
    if script.helper_copies:
        run.helpers.mkdir(exist_ok=True)
    for found in script.helper_copies:
        with contextlib.suppress(FileExistsError):
            (run.helpers / found.name).symlink_to(found)


def _spec(job: JobRow) -> JobSpec:
    try:
        return JobSpec.of(job)
    except ValidationError as error:  # such as one that a newer version of the service wrote
        raise LaunchError(EndReason.SPAWN_FAILED, detail=str(error)) from error


def _program(spec: JobSpec, home: Home) -> tuple[Path, tuple[str, ...]]:
    """Return the program that makes a base model, and its arguments."""
    assert spec.base_model is not None
    if (hub := spec.hub) is not None:
        draft = home.models / UPLOADS / f"download-{spec.base_model.id}"
        return download_program(), (f"--repository={hub.repository}", f"--revision={hub.revision}", f"--draft={draft}")
    assert spec.sample is not None
    try:
        sample = sample_base_model(spec.sample)
    except KeyError as error:  # such as one of a newer version of the service
        raise LaunchError(EndReason.SCRIPT_MISSING, file=spec.sample, detail="") from error
    assert sample.program is not None
    return sample.program, sample.arguments
