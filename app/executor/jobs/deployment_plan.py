"""What a submission's deployment is given: its target, its options, and which of them its script would not see."""

from collections.abc import Sequence

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.definition import CUSTOM_TARGET
from app.domain.deploy_targets import DeployTargetKind
from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.names import NO_QUANTIZATION
from app.domain.pointers import pointer
from app.domain.stage_calls import stage_call
from app.executor.jobs.requests import JobSubmit
from app.executor.jobs.stage_parameters import CheckedParameters
from app.executor.runs.job_spec import Deployment
from app.registry.methods.record import Method
from app.store import named
from app.store.tables import DeployTargetRow


async def deploy_target(session: AsyncSession, method: Method, stages: Sequence[Stage]) -> DeployTargetRow | None:
    """Return the configured target that the submission deploys to."""
    config = method.definition.deployment
    if config is None or config.target is None or JobKind.DEPLOYMENT not in stages:
        return None
    return await named.find(session, DeployTargetRow, config.target)


def planned_deployment(
    method: Method, request: JobSubmit, stages: Sequence[Stage], target: DeployTargetRow | None
) -> tuple[Deployment | None, list[Violation]]:
    config = method.definition.deployment
    if JobKind.DEPLOYMENT not in stages or config is None:
        return None, []
    options = request.deployment.model_dump()
    if method.definition.deploys_itself:
        kind = DeployTargetKind.CUSTOM
        if config.target == CUSTOM_TARGET:
            return Deployment(target=CUSTOM_TARGET, kind=kind, **options), []
    else:
        kind = DeployTargetKind.OLLAMA
    if target is None or target.kind != kind:
        return None, [Violation("/method", "deploy_target_gone", {"target": config.target})]
    return Deployment(target=target.name, kind=kind, url=target.url, settings=target.settings, **options), []


def untaken_options(method: Method, request: JobSubmit, checked: CheckedParameters) -> list[Violation]:
    """Return the options of a deployment that the user's script would not see, or would take for something else."""
    script, pinned = checked.scripts.get(JobKind.DEPLOYMENT), method.files.get(JobKind.DEPLOYMENT)
    call = stage_call(method.definition, JobKind.DEPLOYMENT)
    given = {
        name: value for name, value in request.deployment.model_dump().items() if value and value != NO_QUANTIZATION
    }
    if call.is_explicit and script is not None:
        params = {"script": script.filename}
        return [
            Violation(pointer("deployment", name), "deployment_option_not_taken", params)
            for name in given
            if name not in call.platform_values
        ]
    if script is None or pinned is None or pinned.shipped or script.hides_names:
        return []
    found = []
    for name, value in given.items():
        declared = script.by_name().get(name)
        if declared is None:
            found.append(Violation(pointer("deployment", name), "deployment_option_not_taken", {"script": pinned.file}))
        elif isinstance(value, dict) and declared.is_plain_text:
            params = {"name": name, "script": pinned.file}
            found.append(Violation(pointer("deployment", name), "object_taken_as_text", params))
    return found


def untaken_settings(method: Method, deployment: Deployment, checked: CheckedParameters) -> list[Violation]:
    """Return the settings of the deploy target that a strict script does not get."""
    call = stage_call(method.definition, JobKind.DEPLOYMENT)
    if call.is_explicit:
        strict, names = True, [name for name in deployment.settings if not call.passes(name)]
    else:
        strict = method.definition.arguments.declared_only or checked.refuses_unknown(JobKind.DEPLOYMENT)
        names = [name for name in deployment.settings if not checked.declares(JobKind.DEPLOYMENT, name)]
    params = {"names": ", ".join(names), "target": deployment.target}
    return [Violation("/method", "settings_not_taken", params)] if strict and names else []
