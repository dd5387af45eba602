import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.access.guard import (
    CommercialLicenseRequired,
    LicenceGuard,
    LicenceRecord,
    LicenseState,
    ProjectLimitReached,
)
from app.access.licence import LicenceForged, issue
from app.domain.texts import Language
from app.store.session import Database
from app.store.tables import InstallationRow

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

    def install(self, *, features: tuple[str, ...] = ("methods:write",), days: int = 30, **terms: Any) -> None:
        text = issue(
            KEY,
            licensee="ACME",
            issued_at=START,
            expires_at=START + timedelta(days=days),
            features=features,
            **{"licence_id": "L-1", **terms},
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


class TestEnd:
    def test_is_told_a_month_before_and_in_the_grace_after(self, site: Site) -> None:
        site.install(days=60, grace_days=14)

        told = []
        for day in (0, 29, 30, 59, 60, 73, 74):
            site.clock.now = START + timedelta(days=day)
            told.append((site.guard.allows(), [notice.code for notice in site.guard.notices()]))

        assert told == [
            (True, []),
            (True, []),
            (True, ["license_expires_soon"]),
            (True, ["license_expires_soon"]),
            (True, ["license_in_grace"]),
            (True, ["license_in_grace"]),
            (False, ["license_expired"]),
        ]

    def test_says_how_long_is_left(self, site: Site) -> None:
        site.install(days=60, grace_days=14)
        site.clock.now = START + timedelta(days=50)

        (notice,) = site.guard.notices()

        for language, words in (
            (Language.EN, "in 10 day(s)"),
            (Language.ZH, "还有 10 天"),
            (Language.DE, "in 10 Tag(en)"),
        ):
            assert words in notice.detail(language)
            assert "2026-08-14" in notice.detail(language)

    def test_of_none_is_told_nothing_of(self, site: Site) -> None:
        site.replace(issue(KEY, licensee="ACME", issued_at=START))
        site.clock.now = START + timedelta(days=36500)

        assert site.guard.notices() == []


class TestProjects:
    def test_are_one_without_a_licence_and_as_many_as_it_says(self, site: Site) -> None:
        def room(present: int) -> bool:
            try:
                site.guard.require_room_for_project(present)
            except ProjectLimitReached:
                return False
            return True

        without = [room(0), room(1)]
        site.install(projects=3, edition="team")
        three = [room(2), room(3)]
        site.install()
        unlimited = room(1000)
        site.clock.now += timedelta(days=31)

        assert (without, three, unlimited, room(1)) == ([True, False], [True, False], True, False)
        with pytest.raises(ProjectLimitReached, match=r"may have 1 project"):
            site.guard.require_room_for_project(1)


class TestRecord:
    async def test_clock_that_was_set_back_gives_no_more_time(self, site: Site, database: Database) -> None:
        """Also after a restart; a licence that was never here before begins the record anew."""
        site.install(days=30)
        await LicenceRecord(database, site.guard).look()
        site.clock.now = START + timedelta(days=40)
        await LicenceRecord(database, site.guard).look()
        site.clock.now = START + timedelta(days=10)
        restarted = LicenceGuard(site.path, KEY.public_key(), site.clock)
        record = LicenceRecord(database, restarted)
        await record.look()

        status = restarted.status()
        site.guard.path.write_text(site.path.read_text())
        await record.look()
        same = restarted.allows()
        other = issue(KEY, licensee="ACME", issued_at=START, expires_at=START + timedelta(days=30), licence_id="L-2")
        await record.install(other)

        assert status.state is LicenseState.INVALID
        assert status.error is not None
        assert status.error.code == "license_clock_set_back"
        assert "2026-07-11T00:00" in status.error.detail()
        assert (same, restarted.allows()) == (False, True)

    async def test_small_corrections_and_licences_without_an_end_are_left_alone(
        self, site: Site, database: Database
    ) -> None:
        site.install(days=30)
        record = LicenceRecord(database, site.guard)
        await record.look()
        site.clock.now -= timedelta(minutes=4)
        corrected = site.guard.allows()
        site.replace(issue(KEY, licensee="ACME", issued_at=START - timedelta(days=900)))
        site.clock.now = START - timedelta(days=800)
        await record.look()

        assert (corrected, site.guard.allows()) == (True, True)

    async def test_is_written_once_an_hour(self, site: Site, database: Database) -> None:
        record = LicenceRecord(database, site.guard)
        written = []
        for _ in range(5):
            site.clock.now += timedelta(minutes=25)
            await record.look()
            async with database.reading() as session:
                row = await session.get(InstallationRow, LicenceRecord.KEY)
                assert row is not None
                written.append((row.updated_at - START) / timedelta(minutes=25))

        assert written == [1, 1, 1, 4, 4]

    async def test_garbage_in_the_record_is_written_over(self, site: Site, database: Database) -> None:
        async with database.writing() as session:
            session.add(InstallationRow(key=LicenceRecord.KEY, value={"latest": "soon"}, updated_at=START))
        site.install()

        await LicenceRecord(database, site.guard).look()

        assert site.guard.latest_seen == START

    async def test_licence_that_does_not_count_replaces_nothing(self, site: Site, database: Database) -> None:
        site.install()

        with pytest.raises(LicenceForged):
            await LicenceRecord(database, site.guard).install(
                issue(Ed25519PrivateKey.generate(), licensee="me", issued_at=START)
            )

        assert site.guard.allows()
