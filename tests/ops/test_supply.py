"""The lock is that of `pyproject.toml`, and a look for known holes does not mistake silence for safety."""

import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.supply import FOUND, LICENCES, UNKNOWN, judged, licence_page, locked
from tests.ops.dependencies import ROOT, closure, targets


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


class TestLock:
    def test_pins_every_requirement_for_every_platform_and_python(self) -> None:
        document = project()
        wanted = [*document["project"]["dependencies"], *document["project"]["optional-dependencies"]["parquet"]]
        wanted += document["build-system"]["requires"]
        pins = [requirement for requirement, _ in locked()]

        missing = [
            f"{need} on {target['sys_platform']} {target['platform_machine']}, Python {target['python_version']}"
            for target in targets()
            for need in map(Requirement, wanted)
            if need.marker is None or need.marker.evaluate({**target, "extra": ""})
            if not any(_pins(pin, need, target) for pin in pins)
        ]

        assert missing == [], "run: python -m scripts.supply lock"

    def test_pins_what_requirements_require(self) -> None:
        names = {canonicalize_name(requirement.name) for requirement, _ in locked()}

        assert set().union(*(closure(target) for target in targets())) - names == set()

    def test_names_a_digest_for_every_file(self) -> None:
        for requirement, digests in locked():
            assert digests, requirement
            assert {len(digest) for digest in digests} == {64}, requirement

    def test_the_list_of_licences_names_every_package(self) -> None:
        def names(page: str) -> list[str]:
            return [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]

        # licences change with releases, what is locked does not
        assert names(LICENCES.read_text("utf-8")) == names(licence_page()), "run: python -m scripts.supply licences"


def _pins(pin: Requirement, need: Requirement, target: Any) -> bool:
    (exact,) = pin.specifier
    applies = pin.marker is None or pin.marker.evaluate({**target, "extra": ""})
    return canonicalize_name(pin.name) == canonicalize_name(need.name) and applies and exact.version in need.specifier


class TestAudit:
    @pytest.mark.parametrize(
        ("found", "status", "says"),
        [
            ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "1", "vulns": []}], 0, "no known"),
            (
                [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}],
                UNKNOWN,
                "knows 1 of 2",
            ),
            ([], UNKNOWN, "knows 2 of 2"),
            ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}], FOUND, "a 1: CVE-1"),
        ],
        ids=["all well", "one unknown", "no answer", "a hole"],
    )
    def test_silence_is_no_good_answer(
        self, found: list[dict[str, Any]], status: int, says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert judged("service", found, wanted=2) == status
        assert says in capsys.readouterr().out
