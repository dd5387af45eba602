"""Put what a demo run needs into the service: a base model, a data set, a method of one's own, a licence.

The licence is a throw-away pair of keys and a licence of one day, there only while the demo runs.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from app.access import licence as licences
from app.access.guard import LicenceGuard
from app.cli.client import Api, ServiceRefused, segment
from app.cli.command import CliFailure
from app.cli.processes import Say
from app.domain.environment_reports import EnvironmentState
from app.domain.texts import DEFAULT_LANGUAGE
from app.executor.environments.activation import interpreter
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environments import find_environment
from app.presets.catalogue import SampleBaseModel, environment_specs, sample_base_models, sample_datasets
from app.presets.sample_data import write_with_pictures
from app.presets.sample_pictures import draw_all
from app.registry.environment_spec import parse_spec
from app.settings import Settings
from app.store.home import NodeHome

FOLDER: Final = "demo-licence"
LIFETIME: Final = timedelta(days=1)
_PUBLIC_KEY_VARIABLE: Final = "DEEPE_LICENSE_PUBLIC_KEY"


class SampleMissing(CliFailure):
    """The product ships no sample of this name."""


def ensure_base_model(api: Api, settings: Settings, name: str, *, say: Say) -> None:
    """Register the sample base model; copy or build its folder first if it is not there yet."""
    if _exists(api, f"/base-models/{segment(name)}"):
        return
    sample = base_model_sample(name)
    folder = settings.home / "models" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if sample.folder is not None:
            shutil.copytree(sample.folder, folder)
        else:
            _build(sample, folder, settings, say=say)
    api.post("/base-models", {"name": name, "path": name, "description": sample.description[DEFAULT_LANGUAGE]})


def ensure_dataset(api: Api, settings: Settings, name: str) -> None:
    """Upload the sample data set if it is not there yet; one with pictures becomes a folder of the home."""
    if _exists(api, f"/datasets/{segment(name)}"):
        return
    sample = next((sample for sample in sample_datasets() if sample.name == name), None)
    if sample is None:
        raise SampleMissing(f"No data set {name} is shipped.")
    if not sample.with_pictures:
        api.put_file(f"/datasets/{segment(name)}/file", sample.path)
        return
    write_with_pictures(sample.path, settings.home / "datasets" / name)
    api.post("/datasets", {"name": name, "path": name, "description": sample.description[DEFAULT_LANGUAGE]})


def ensure_pictures(settings: Settings, names: Sequence[str]) -> list[dict[str, str]]:
    """Draw pictures where those of questions lie, and return them as a message has them."""
    draw_all(names, settings.home / "multimodal")
    return [{"data": f"multimodal/{name}"} for name in names]


def ensure_method(api: Api, name: str) -> None:
    """Install the shipped method if it is not there yet."""
    if not _exists(api, f"/methods/{segment(name)}"):
        api.post(f"/presets/{segment(name)}:install")


def copy_method(api: Api, method: str, *, name: str) -> dict[str, Any]:
    """Copy a method under `name`, with a number behind it when that is taken."""
    for number in range(1, 1000):
        try:
            copied: dict[str, Any] = api.post(
                f"/methods/{segment(method)}:copy", {"name": name if number == 1 else f"{name} {number}"}
            )
        except ServiceRefused as refused:
            if refused.code != "name_taken":
                raise
        else:
            return copied
    raise CliFailure(f"A thousand methods are called {name}; delete some.")


def base_model_sample(name: str) -> SampleBaseModel:
    """Return the shipped sample of this name."""
    sample = next((sample for sample in sample_base_models() if sample.name == name), None)
    if sample is None:
        raise SampleMissing(f"No base model {name} is shipped.")
    return sample


def environment_python(settings: Settings, name: str) -> Path:
    """Return the interpreter of an environment that is ready on this machine."""
    file = environment_specs().get(name)
    found = find_environment(
        name,
        parse_spec(file.read_text("utf-8")) if file else None,
        envs_dir=NodeHome(settings.node_home).environments,
        search=CondaSearch.of(os.environ, root=settings.conda_root),
    )
    if found.prefix is None or found.state is not EnvironmentState.READY:
        raise CliFailure(f"The environment {name} is not ready on this machine.")
    return interpreter(found.prefix)


def _build(sample: SampleBaseModel, folder: Path, settings: Settings, *, say: Say) -> None:
    """Run the sample's program; it writes the folder as a whole or not at all."""
    assert sample.program is not None
    assert sample.environment is not None
    python = environment_python(settings, sample.environment)
    command = [str(python), str(sample.program), *sample.arguments, "--output", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                say(lines[-1])
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise CliFailure(f"The base model {sample.name} could not be built.", notes=lines[-10:])


def _exists(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except ServiceRefused as refused:
        if refused.status == 404:
            return False
        raise
    return True


@contextmanager
def borrowed_licence(settings: Settings, *, say: Say) -> Iterator[dict[str, str]]:
    """Yield what the service's environment needs so that methods can be created; afterwards all is as before.

    A licence of the home that counts is used as it is. Another one is put aside meanwhile.
    """
    path = licences.licence_path(settings.home)
    aside = path.with_name(f"{path.name}.put-aside")
    folder = settings.home / FOLDER
    _clean_up(folder, path, aside)
    guard = LicenceGuard(path, licences.load_public_key(settings.license_public_key), lambda: datetime.now(UTC))
    if guard.allows():
        yield {}
        return
    shutil.rmtree(folder, ignore_errors=True)
    private_key, public_key = licences.keygen(folder)
    now = datetime.now(UTC)
    text = licences.issue(
        licences.load_private_key(private_key), licensee="deepe demo", issued_at=now, expires_at=now + LIFETIME
    )
    private_key.unlink()
    if path.exists():
        path.replace(aside)
    say(f"a throw-away licence of this demo lies at {path}; it is removed at the end")
    try:
        licences.install(text, path, public_key=licences.load_public_key(public_key), now=now)
        yield {_PUBLIC_KEY_VARIABLE: str(public_key)}
    finally:
        _clean_up(folder, path, aside)


def _clean_up(folder: Path, path: Path, aside: Path) -> None:
    """Undo what a demo did to the home; also one that was killed."""
    if folder.exists():
        path.unlink(missing_ok=True)
        shutil.rmtree(folder)
    if aside.exists():
        aside.replace(path)
