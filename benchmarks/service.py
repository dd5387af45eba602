"""A service with real processes in a temporary home, for benchmarks that go through HTTP."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from app.cli.private_redis import NO_REDIS, RedisChoice, RedisKind
from tests.e2e.installation import Installation
from tests.servers import private_redis
from tests.worker.harness import make_base


@contextmanager
def running_service(
    *, redis: bool, environments: Mapping[str, Path] | None = None, **variables: str
) -> Iterator[Installation]:
    """Yield a licensed service with the samples of Custom01; its node has the environment `base`.

    It polls the database as seldom as a real one does.
    """
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (base,) = make_base(root / "base")
        choice = NO_REDIS
        if redis:
            (root / "redis").mkdir()
            server = stack.enter_context(private_redis(root / "redis"))
            choice = RedisChoice(RedisKind.CONFIGURED, url=f"redis://127.0.0.1:{server.port}")
        site = Installation(
            root, {"base": base, **(environments or {})}, redis=choice, **{"DEEPE_POLL_SECONDS": "2", **variables}
        )
        stack.callback(site.close)
        site.install_licence()
        site.start()
        site.add_samples()
        yield site


def base_interpreter(site: Installation) -> Path:
    """Return the interpreter that the node runs stages of `base` with."""
    return site.node_home / "envs" / "base" / "bin" / "python"
