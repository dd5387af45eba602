"""The servers behind deploy targets: asked whether they answer, and to unload a model."""

from typing import Final

from app.domain.errors import Unavailable
from app.domain.plain_text import shown

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


async def ask_start_page(url: str) -> int:
    """Return the status with which the server answers. Raises `TargetSilent`."""
    import httpx

    try:
        # as deployments do: no proxy from the environment, and what it refers to is not asked
        async with (
            httpx.AsyncClient(timeout=_ANSWER_SECONDS, trust_env=False) as client,
            client.stream("GET", url) as answer,
        ):
            return answer.status_code
    except httpx.TimeoutException as exc:
        raise TargetSilent(f"no answer within {_ANSWER_SECONDS:.0f} s") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise TargetSilent(str(exc) or type(exc).__name__) from exc


async def unload_from_ollama(url: str, model: str) -> None:
    """Delete `model` in the Ollama at `url`; one that it does not have is as good as deleted."""
    import httpx  # takes a tenth of a second, and models are rarely deleted

    try:
        # no proxy from the environment: deployments reach the tool without one as well
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            answer = await client.request("DELETE", f"{url}/api/delete", json={"model": model})
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise DeployTargetUnreachable(url=url, problem=str(exc) or type(exc).__name__) from exc
    if answer.status_code >= 400 and answer.status_code != httpx.codes.NOT_FOUND:
        problem = f"HTTP {answer.status_code} {answer.text[:_LONGEST_ANSWER]}".strip()
        raise DeployTargetUnreachable(url=url, problem=problem)
