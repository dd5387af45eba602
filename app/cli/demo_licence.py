"""The demo's licence: a throw-away pair of keys and a licence of one day, there only while the demo runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from app.cli.processes import Say

if TYPE_CHECKING:
    from app.settings import Settings

FOLDER: Final = "demo-licence"
LIFETIME: Final = timedelta(days=1)
_PUBLIC_KEY_VARIABLE: Final = "DEEPE_LICENSE_PUBLIC_KEY"


@contextmanager
def borrowed_licence(settings: "Settings", *, say: Say) -> Iterator[dict[str, str]]:
    """Yield what the service's environment needs so that methods can be created; afterwards all is as before.

    A licence of the home that counts is used as it is. Another one is put aside meanwhile.
    """
    from app.access import licence as licences
    from app.access.guard import LicenceGuard

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
