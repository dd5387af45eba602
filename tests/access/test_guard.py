import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.access.guard import CommercialLicenseRequired, LicenceGuard, LicenseState
from app.access.licence import issue
from app.domain.texts import Language

KEY = Ed25519PrivateKey.generate()
START = datetime(2026, 6, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


class Site:
    def __init__(self, home: Path) -> None:
        self.clock = Clock()
        self.path = home / "license.json"
        self.guard = LicenceGuard(self.path, KEY.public_key(), self.clock)

    def install(self, *, features: tuple[str, ...] = ("methods:write",), days: int = 30) -> None:
        text = issue(
            KEY,
            licensee="ACME",
            issued_at=START,
            expires_at=START + timedelta(days=days),
            features=features,
            licence_id="L-1",
        )
        self.replace(text)

    def replace(self, text: str) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(self.path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def refusal(site: Site, feature: str = "methods:write") -> CommercialLicenseRequired:
    with pytest.raises(CommercialLicenseRequired) as caught:
        site.guard.require(feature)
    return caught.value


class TestRequire:
    def test_passes_with_a_licence(self, site: Site) -> None:
        site.install()

        site.guard.require("methods:write")

        assert site.guard.allows("methods:write")

    def test_without_a_licence_names_the_way_out(self, site: Site) -> None:
        error = refusal(site)

        assert "Custom01" in error.detail()
        assert "deepe license install" in error.detail(Language.ZH)
        assert error.violations() == ()
        assert not site.guard.allows()

    def test_licence_for_everything_includes_each_feature(self, site: Site) -> None:
        site.install(features=("*",))

        site.guard.require("anything")

    def test_says_which_feature_is_lacking(self, site: Site) -> None:
        site.install(features=("other",))

        assert [violation.code for violation in refusal(site).violations()] == ["license_lacks_feature"]

    def test_installed_licence_counts_without_a_restart(self, site: Site) -> None:
        refusal(site)

        site.install()

        site.guard.require()

    def test_licence_expires_under_a_running_service(self, site: Site) -> None:
        site.install(days=30)
        site.guard.require()

        site.clock.now += timedelta(days=30)

        error = refusal(site)
        assert error.code == "commercial_license_required"
        assert [violation.code for violation in error.violations()] == ["license_expired"]
        assert "L-1 expired at 2026-07-01T00:00:00Z" in error.detail()

    def test_forged_licence_says_so(self, site: Site) -> None:
        site.replace(issue(Ed25519PrivateKey.generate(), licensee="me", issued_at=START))

        assert [violation.code for violation in refusal(site).violations()] == ["license_forged"]

    def test_change_of_the_same_length_at_the_same_time_is_noticed(self, site: Site) -> None:
        site.install()
        site.guard.require()
        stat = site.path.stat()

        text = site.path.read_text()
        site.replace(text.replace('"signature": "', '"signature": "A')[: len(text)])
        os.utime(site.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

        refusal(site)

    def test_other_bytes_in_the_same_file_with_the_same_times_are_noticed(self, site: Site) -> None:
        site.install()
        site.guard.require()
        stat, text = site.path.stat(), site.path.read_text()

        site.path.write_text(text.replace('"signature": "', '"signature": "A')[: len(text)])
        os.utime(site.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = site.path.stat()

        assert (after.st_size, after.st_ino, after.st_mtime_ns) == (stat.st_size, stat.st_ino, stat.st_mtime_ns)
        refusal(site)

    def test_removed_licence_counts_no_more(self, site: Site) -> None:
        site.install()
        site.guard.require()

        site.path.unlink()

        assert site.guard.status().state is LicenseState.NONE

    def test_unreadable_file_is_an_invalid_licence(self, site: Site) -> None:
        site.path.mkdir()

        assert site.guard.status().state is LicenseState.INVALID
