"""Remove deployed models from Ollama."""

from typing import Final

from app.domain.errors import Unavailable

_TIMEOUT_SECONDS: Final = 30.0
_LONGEST_ANSWER: Final = 200


class DeployTargetUnreachable(Unavailable):
    """The serving tool does not answer, or refuses."""

    code = "deploy_target_unreachable"


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
