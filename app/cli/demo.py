"""`deepe demo`: register a method, train, save, deploy and ask the model, with everything to be seen on the way.

`--all` does it with every method for this machine and ends with a table: time, scores before and after, what was made;
`--base-model` does it with base models of one's own instead of the sample.

Needs no terminal and no input. Uses the home of `deepe dev`, so that what it made can be looked at afterwards. Leaves
no process behind, however it ends.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from app.cli.client import Api
from app.cli.command import CliFailure, ExitCode, HomeFolder, typed
from app.cli.demo_samples import (
    borrowed_licence,
    copy_method,
    ensure_pictures,
    install_with_samples,
    upload_base_model,
)
from app.cli.demo_screen import DemoScreen, Outcome, outcome_of, print_outcomes
from app.cli.dev import Interrupted, cancel_jobs, ending_on_signals, say
from app.cli.embedded import EmbeddedOptions, EmbeddedService
from app.cli.models import ask
from app.cli.output import console, duration, is_terminal
from app.cli.private_redis import NO_REDIS, choices
from app.cli.service import load_and_hide
from app.cli.watch import TERMINAL, LiveScreen, PlainScreen, watch_chain
from app.domain.enums import JobKind, Platform
from app.domain.kinds import KINDS
from app.presets.catalogue import PresetManifest, load_manifests, sample_base_model
from app.registry.nodes.platforms import this_machine
from app.settings import Settings
from app.store.home import make_private_folder

DEFAULT_METHOD: Final = "SFT-Demo"
QUESTIONS: Final = 3
ANSWER_TOKENS: Final = 64
NODE_SECONDS: Final = 60.0
Shown = tuple[PresetManifest, Path | None]
"""A method, and the base model that it trains instead of its sample."""


@dataclass
class Times:
    """When things happened, in seconds of a steady clock."""

    started: float = field(default_factory=time.monotonic)
    preparing: float = 0.0
    submitted: float | None = None
    first_step: float | None = None

    @property
    def total(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def preparation(self) -> Iterator[None]:
        """Count what happens inside as installation: it is done once per machine."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.preparing += time.monotonic() - began

    def step(self) -> None:
        """Note the first training step."""
        if self.first_step is None:
            self.first_step = time.monotonic()


def demo(
    method: Annotated[str, typer.Argument(help="The shipped method to show.")] = DEFAULT_METHOD,
    every: Annotated[bool, typer.Option("--all", help="Show every method for this machine, and compare.")] = False,
    base_models: Annotated[
        list[Path] | None,
        typer.Option(
            "--base-model",
            metavar="FOLDER",
            file_okay=False,
            exists=True,
            help="Train this base model instead of the sample; several are shown one after the other, and compared.",
        ),
    ] = None,
    home: HomeFolder = None,
    no_redis: Annotated[bool, typer.Option("--no-redis", help="Run without any Redis.")] = False,
) -> None:
    """Train, save and ask a model for real.

    Starts the service, registers a method, builds what it needs, trains with the shipped samples, shows the curve and
    what the model answers, and stops everything again.
    """
    manifests = for_this_machine() if every else [shipped(method)]
    bases: list[Path | None] = [*base_models] if base_models else [None]
    settings = load_and_hide(home=home, port=0)
    with ending_on_signals(at_once=True):
        try:
            _run(list(product(manifests, bases)), settings, no_redis=no_redis)
        except Interrupted:
            say("interrupted; nothing of it goes on")
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def shipped(method: str) -> PresetManifest:
    """Return the manifest of a shipped method."""
    manifests = {manifest.name.casefold(): manifest for manifest in load_manifests()}
    if method.casefold() not in manifests:
        known = ", ".join(manifest.name for manifest in manifests.values())
        raise CliFailure(f"No method {method} is shipped.", notes=(f"There is: {known}",))
    return manifests[method.casefold()]


def for_this_machine() -> list[PresetManifest]:
    """Return the manifests of all shipped methods that can run here."""
    return [manifest for manifest in load_manifests() if this_machine() in manifest.platforms]


def _run(shown: list[Shown], settings: Settings, *, no_redis: bool) -> None:
    times, screen = Times(), console()
    make_private_folder(settings.home)
    with borrowed_licence(settings, say=say) as environment:
        configured = settings.redis_url.get_secret_value() if settings.redis_url else None
        options = EmbeddedOptions(
            command="deepe demo",
            redis=(NO_REDIS,) if no_redis else choices(configured),
            log_folder=settings.node_home / "logs",
            environment=environment,
        )
        service = EmbeddedService(settings, options, say=say)
        try:
            url = service.start()
            _headline(screen, f"The service runs after {times.total:.1f} s")
            for line in (f"API: {url}", f"home: {settings.home}", f"Redis: {service.redis.describe()}"):
                screen.print(f"  {line}", markup=False, soft_wrap=True)
            with Api(url, token=settings.token or "", project="") as api:
                if len(shown) > 1:
                    _show_all(api, shown, settings, screen)
                    return
                ((manifest, base),) = shown
                made = Demo(api, manifest, settings, times, screen, base).run()
        finally:
            service.stop()
    _farewell(screen, times, made)


def _show_all(api: Api, shown: list[Shown], settings: Settings, screen: Console) -> None:
    """Show one after the other, also when one fails, and what came of each; exit 1 if one failed."""
    outcomes = []
    for manifest, base in shown:
        times = Times()
        name = f"{manifest.name}, {base.name}" if base is not None else manifest.name
        demo = Demo(api, manifest, settings, times, screen, base)
        try:
            demo.run()
            outcomes.append(outcome_of(api, name, demo.ended, seconds=times.total - times.preparing))
        except CliFailure as failure:
            screen.print(f"  {failure.message}", style="red", markup=False, soft_wrap=True)
            outcomes.append(Outcome(name, seconds=times.total - times.preparing, failure=failure.message))
    print_outcomes(outcomes)
    if any(outcome.failure for outcome in outcomes):
        raise typer.Exit(ExitCode.FAILED)


class Demo:
    """One run against a service. What it started is cancelled when it does not come to its end."""

    def __init__(
        self,
        api: Api,
        manifest: PresetManifest,
        settings: Settings,
        times: Times,
        screen: Console,
        base: Path | None = None,
    ) -> None:
        self._api = api
        self._base = base
        self._manifest = manifest
        self._settings = settings
        self._times = times
        self._screen = screen
        self._jobs: list[str] = []
        self.ended: list[dict[str, Any]] = []

    def run(self) -> str | None:
        """Show everything and return a model that can be asked; `CliFailure` if a job fails, after it was shown why."""
        try:
            samples = install_with_samples(self._api, self._manifest.name)
            with self._times.preparation():
                self._build_environments()
                if self._base is not None:
                    samples = {**samples, "base_model": upload_base_model(self._api, self._base)}
            self.ended = self._train(self._register(), samples)
            asked = [model for job in self.ended if (model := self._ask(job))]
            return asked[-1] if asked else None
        except BaseException:
            self._cancel()
            raise

    def _build_environments(self) -> None:
        """Build what is built once per machine, also for the base model if a program makes it."""
        makes_base = None if self._base is not None else sample_base_model(self._manifest.demo.base_model).environment
        for environment in self._environments(makes_base):
            self._headline(f"Building the environment {environment} (once per machine)")
            job = self._api.post(f"/environments/{environment}:build")
            self._watch(job["id"], job)

    def _environments(self, of_base_model: str | None) -> list[str]:
        """Return the environments that the run needs and the node has not."""
        definition = self._manifest.definition
        stages = definition.get("stages", {}) | {"deployment": definition.get("deployment") or {}}
        used = [self._replaced().get(name, stage.get("conda_env")) for name, stage in stages.items()]
        wanted = dict.fromkeys(name for name in (of_base_model, *used) if name)
        self._wait_for_node()
        return [name for name in wanted if not self._is_ready(name)]

    def _replaced(self) -> dict[str, str]:
        """Return the environments that stages of the demo run in on this machine instead of the method's own."""
        return {} if this_machine() is Platform.CUDA else self._manifest.demo.environments_without_cuda

    def _wait_for_node(self) -> None:
        """Wait until the worker has reported what the node has; reports of an earlier run do not count."""
        deadline = time.monotonic() + NODE_SECONDS
        while time.monotonic() < deadline:
            if any(node["heartbeat_age_seconds"] < self._times.total for node in self._api.items("/nodes")):
                return
            time.sleep(0.05)

    def _is_ready(self, environment: str) -> bool:
        found = self._api.get(f"/environments/{environment}")
        return any(node["state"] == "ready" for node in found["nodes"])

    def _register(self) -> dict[str, Any]:
        method = copy_method(self._api, self._manifest.name, name=f"My {self._manifest.name}")
        self._headline(f"Registered: {method['name']}")
        self._say(method["description"])
        self._say(f"lifecycle: {' → '.join(method['lifecycle'])}")
        if replaced := self._replaced():
            stages = {stage: {"conda_env": environment} for stage, environment in replaced.items()}
            method = self._api.patch(f"/methods/{method['id']}", {"stages": stages})
            for stage, environment in replaced.items():
                own = self._manifest.definition["stages"][stage]["conda_env"]
                self._say(f"no NVIDIA GPU here: {stage} runs in the environment {environment} instead of {own}")
        return method

    def _train(self, method: dict[str, Any], samples: dict[str, Any]) -> list[dict[str, Any]]:
        job = self._api.post(
            "/jobs",
            {
                "method": method["name"],
                "base_model": samples["base_model"],
                "dataset": samples["dataset"],
                "parameters": samples["parameters"],
                "through": method["lifecycle"][-1],
                "name": "demo",
            },
        )
        self._times.submitted = time.monotonic()
        self._jobs += [link["id"] for link in job["chain"]]
        if (build := self._api.get(f"/jobs/{job['id']}")["waiting_for"]) is not None:
            with self._times.preparation():
                self._headline(f"Making the base model {samples['base_model']} (once per machine)")
                self._watch(build, self._api.get(f"/jobs/{build}"))
            self._times.submitted, self._times.first_step = time.monotonic(), None  # what follows is the training
        self._headline(f"Submitted: {' → '.join(link['stage'] for link in job['chain'])}")
        return self._watch(job["id"], *job["chain"])

    def _ask(self, job: dict[str, Any]) -> str | None:
        """Ask the model that a job made, if the method can; return its name."""
        state = KINDS[JobKind(job["stage"])].produces
        if state is None or not self._manifest.definition.get("inference", {}).get(state):
            return None
        model: str = self._api.get(f"/models/{job['result_model']}")["name"]
        self._headline(f"Asking the {state} model {model}")
        for question, pictures in self._manifest.demo.asked()[:QUESTIONS]:
            self._say(" ".join((*pictures, question)))
            self._screen.print("    → ", end="")
            message: dict[str, Any] = {"role": "user", "content": question}
            if pictures:
                message["images"] = ensure_pictures(self._settings, pictures)
            ask(self._api, job["result_model"], [message], {"max_tokens": ANSWER_TOKENS}, as_json=False)
        return model

    def _watch(self, job_id: str, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        self._jobs += [job["id"] for job in jobs if job["id"] not in self._jobs]
        with ExitStack() as stack:
            inner = stack.enter_context(LiveScreen(self._screen)) if is_terminal() else PlainScreen(indent="  ")
            ended = watch_chain(self._api, job_id, DemoScreen(inner, self._screen, on_step=self._times.step))
        failed = [job for job in ended if job["status"] != "succeeded"]
        if failed:
            raise CliFailure(f"The job of stage {failed[0]['stage']} {failed[0]['status']}: {failed[0]['reason']}.")
        return ended

    def _cancel(self) -> None:
        """Cancel the demo's own jobs that have not ended; others of this home are none of our business."""
        try:
            jobs = [self._api.get(f"/jobs/{job}") for job in self._jobs]
            cancel_jobs(self._api, [job for job in jobs if job["status"] not in TERMINAL])
        except CliFailure as failure:
            self._say(f"its jobs could not be cancelled: {failure.message}")

    def _headline(self, text: str) -> None:
        _headline(self._screen, text)

    def _say(self, line: str) -> None:
        self._screen.print(f"  {line}", markup=False, soft_wrap=True)


def _headline(screen: Console, text: str) -> None:
    screen.print(f"\n[bold cyan]▸[/] [bold]{escape(text)}[/]")


def _farewell(screen: Console, times: Times, model: str | None) -> None:
    _headline(screen, f"Done after {duration(times.total)}")
    if times.preparing >= 1.0:
        screen.print(f"  without what is built once per machine: {duration(times.total - times.preparing)}")
    if times.submitted is not None and times.first_step is not None:
        screen.print(
            f"  first training step {times.first_step - times.submitted:.1f} s after the submit, "
            f"{times.first_step - times.started:.1f} s after the start"
        )
    screen.print("\n[bold]Go on with[/]")
    steps = {
        typed("dev"): "the same service, until Ctrl-C; then, in another terminal:",
        typed("models list"): "what the demo made",
        typed(f"models chat {model}"): "talk to it" if model else "",
        typed("methods parameters Custom01"): "a template to adapt to your own needs",
        "curl http://127.0.0.1:8000/api/v1/jobs": "the API; its documentation: http://127.0.0.1:8000/docs",
    }
    for command, meaning in steps.items():
        if meaning:
            screen.print(f"  {command}\n      {meaning}", markup=False, soft_wrap=True)
