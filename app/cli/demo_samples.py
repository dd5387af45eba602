"""Put what a demo run needs into the service: a shipped method and its samples, a copy of it, a licence.

The licence is a throw-away pair of keys and a licence of one day, there only while the demo runs.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Final

from app.access import licence as licences
from app.access.guard import LicenceGuard
from app.cli.client import Api, ServiceRefused, segment
from app.cli.command import CliFailure
from app.cli.processes import Say
from app.cli.transfer import upload_files
from app.presets.sample_pictures import draw_all
from app.settings import Settings

FOLDER: Final = "demo-licence"
LIFETIME: Final = timedelta(days=1)
_PUBLIC_KEY_VARIABLE: Final = "DEEPE_LICENSE_PUBLIC_KEY"


def install_with_samples(api: Api, preset: str) -> dict[str, Any]:
    """Install a shipped method if it is not there, and return the samples that came with it."""
    api.post(f"/presets/{segment(preset)}:install")
    samples: dict[str, Any] = api.get(f"/presets/{segment(preset)}")["samples"]
    if samples["dataset"] is None or samples["base_model"] is None:
        raise CliFailure(f"The samples of {preset} are not here.", notes=("The demo needs DEEPE_SAMPLES=true.",))
    return samples


def ensure_pictures(settings: Settings, names: Sequence[str]) -> list[dict[str, str]]:
    """Draw pictures where those of questions lie, and return them as a message has them."""
    draw_all(names, settings.home / "multimodal")
    return [{"data": f"multimodal/{name}"} for name in names]


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


def upload_base_model(api: Api, folder: Path) -> str:
    """Upload a base model under the folder's name, with a number behind it when that is taken; return the name."""
    names = (folder.resolve().name if number == 1 else f"{folder.resolve().name}-{number}" for number in count(1))
    taken = {entry["name"] for entry in api.items("/base-models")}
    name = next(name for name in names if name not in taken)
    upload_files(api, f"/base-models/{segment(name)}", folder, go_on=False)
    api.post("/base-models", {"name": name})
    return name


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
