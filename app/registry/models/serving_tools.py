"""The servers behind deploy targets: asked whether they answer, and to unload a model."""

from http import HTTPStatus
from typing import Final

from app.domain.errors import Unavailable
from app.domain.plain_text import shown
from app.presets.shared.helpers.deepe_addresses import AddressPolicy

_TIMEOUT_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 5.0
_LONGEST_ANSWER: Final = 200


class DeployTargetUnreachable(Unavailable):
    """The serving tool does not answer, or refuses."""

    code = "deploy_target_unreachable"


class TargetSilent(Exception):
    """The server of a deploy target gives no answer; `problem` says why."""

    def __init__(self, problem: str) -> None:
        self.problem = shown(problem, limit=_LONGEST_ANSWER)
        super().__init__(self.problem)


async def ask_start_page(url: str, *, policy: AddressPolicy) -> int:
    """Return the status with which the server answers. Raises `TargetSilent`."""
    from app.registry.outbound import NoReply, request

    try:
        reply = await request("GET", url, policy=policy, seconds=_ANSWER_SECONDS)
    except NoReply as exc:
        raise TargetSilent(str(exc)) from exc
    return reply.status


async def unload_from_ollama(url: str, model: str, *, policy: AddressPolicy) -> None:
    """Delete `model` in the Ollama at `url`; one that it does not have is as good as deleted."""
    from app.registry.outbound import NoReply, request

    document = {"model": model}
    try:
        reply = await request("DELETE", f"{url}/api/delete", policy=policy, seconds=_TIMEOUT_SECONDS, document=document)
    except NoReply as exc:
        raise DeployTargetUnreachable(url=url, problem=str(exc)) from exc
    if reply.status >= 400 and reply.status != HTTPStatus.NOT_FOUND:
        problem = f"HTTP {reply.status} {reply.text[:_LONGEST_ANSWER]}".strip()
        raise DeployTargetUnreachable(url=url, problem=problem)
