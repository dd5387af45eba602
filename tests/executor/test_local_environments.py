"""What a node finds and reports of its environments."""

from pathlib import Path

import pytest

from app.domain.environment_reports import EnvironmentReport, EnvironmentState
from app.executor.environments import environments
from app.executor.environments.builders import BuildRules
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import EnvironmentArchive, Pack
from app.executor.environments.environments import last_use, lock_path, mark_used, planned_prefix, write_marker
from app.executor.environments.local_environments import LocalEnvironments, Look
from app.registry.environments.specs import parse_spec, spec_hash

SPEC = "dependencies: [python, pip, {pip: [torch]}]"
NEWER = "dependencies: [python, pip, {pip: [torch>2]}]"


class Node:
    """The environments folder of one node."""

    def __init__(self, root: Path) -> None:
        (root / "envs").mkdir()
        self.envs = root / "envs"
        self.search = CondaSearch(environ={"PATH": ""}, home=root / "home", root=root / "home" / "conda")
        self.local = LocalEnvironments(envs_dir=self.envs, search=self.search, rules=BuildRules(builder="venv"))

    def build(self, name: str, spec: str) -> Path:
        prefix = planned_prefix(name, parse_spec(spec), self.envs)
        python(prefix)
        lock_path(prefix).touch()
        write_marker(
            prefix, name=name, spec=parse_spec(spec), builder="venv", packages=[], python_version="3.11.7", lock="ab"
        )
        return prefix

    def report(self, name: str, **specs: str | None) -> EnvironmentReport:
        return {report.name: report for report in self.local.look(specs).reports}[name]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def python(prefix: Path) -> Path:
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").touch(mode=0o755)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
    return prefix


class TestReports:
    def test_build_with_everything_that_is_known_of_it(self, node: Node) -> None:
        prefix = node.build("trl", SPEC)
        mark_used(node.envs, prefix)

        report = node.report("trl", trl=SPEC)

        assert (report.state, report.source, report.prefix) == (EnvironmentState.READY, "built", str(prefix))
        assert (report.builder, report.python, report.lock) == ("venv", "3.11.7", "ab")
        assert report.spec_hash == spec_hash(parse_spec(SPEC))
        assert report.size_bytes is not None
        assert report.size_bytes > 0
        assert report.built_at is not None
        assert report.used_at is not None
        assert EnvironmentReport.read([report.document()]) == {"trl": report}

    def test_stale_known_and_missing(self, node: Node) -> None:
        node.build("trl", SPEC)

        found = {
            report.name: (report.state, report.trouble.code if report.trouble else None)
            for report in node.local.look(
                {"trl": NEWER, "new": SPEC, "bare": None, "foreign": "dependencies: [ffmpeg]", "odd": "- a"}
            ).reports
        }

        assert found == {
            "base": (EnvironmentState.KNOWN, None),
            "trl": (EnvironmentState.STALE, None),
            "new": (EnvironmentState.KNOWN, None),
            "bare": (EnvironmentState.MISSING, "environment_without_spec"),
            "foreign": (EnvironmentState.MISSING, "environment_needs_conda"),
            "odd": (EnvironmentState.MISSING, "invalid_request"),
        }

    def test_node_without_network_can_build_what_is_packed(self, node: Node, tmp_path: Path) -> None:
        rules = BuildRules(builder="venv", offline=True, archive=tmp_path / "shared")
        node.local = LocalEnvironments(envs_dir=node.envs, search=node.search, rules=rules)
        before = node.report("trl", trl=SPEC)
        archive = EnvironmentArchive(tmp_path / "shared", "trl", parse_spec(SPEC))
        file = archive.pack_file("wheels")
        file.parent.mkdir(parents=True)
        file.touch()
        pack = Pack(
            kind="wheels",
            file=file.name,
            sha256="",
            size_bytes=0,
            spec_hash=spec_hash(parse_spec(SPEC)),
            platform="",
            python="",
            lock="",
            node="one",
        )
        file.with_suffix(".json").write_text(pack.model_dump_json())

        after = node.report("trl", trl=SPEC)

        assert before.trouble is not None
        assert (before.state, before.trouble.code) == (EnvironmentState.MISSING, "environment_needs_pack")
        assert (after.state, after.trouble) == (EnvironmentState.KNOWN, None)
        assert node.report("base").state is EnvironmentState.KNOWN

    def test_found_environments_tell_their_python(self, node: Node) -> None:
        python(node.envs / "placed")
        conda = python(node.search.home / ".conda" / "envs" / "users")
        (conda / "conda-meta").mkdir()
        (conda / "conda-meta" / "python-3.10.4-h12debd9_0.json").touch()

        placed, users = node.report("placed"), node.report("users")

        assert (placed.source, placed.python, placed.size_bytes) == ("venv", "3.12.1", None)
        assert (users.source, users.python, users.state) == ("conda", "3.10.4", EnvironmentState.READY)

    def test_documents_of_other_versions_are_read_as_far_as_they_go(self) -> None:
        documents: list[dict[str, object]] = [
            {"name": "a", "state": "ready", "new": 1},
            {"name": "b", "state": "dreaming"},
            {},
        ]

        assert list(EnvironmentReport.read(documents)) == ["a"]


class TestLook:
    def test_reads_a_marker_again_only_when_it_changed(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(50):
            node.build(f"env{number}", SPEC)
        reads = []
        read_marker = environments.read_marker

        def counted(prefix: Path) -> environments.Build | None:
            reads.append(prefix)
            return read_marker(prefix)

        monkeypatch.setattr(environments, "read_marker", counted)
        specs: dict[str, str | None] = {f"env{number}": SPEC for number in range(50)}

        first = node.local.look(specs)
        again = node.local.look(specs)
        changed = node.build("late", NEWER)
        third = node.local.look(specs)

        assert (first.documents(), len(first.ready)) == (again.documents(), 50)
        assert len(reads) == 51
        assert third.found["late"].prefix == changed

    def test_forgets_what_is_gone(self, node: Node) -> None:
        prefix = node.build("trl", SPEC)
        before = node.local.look({})
        (prefix / environments.MARKER).unlink()

        after = node.local.look({})

        assert (before.ready, after.ready) == (frozenset({"trl"}), frozenset())

    def test_nothing_there(self, tmp_path: Path) -> None:
        rules, search = BuildRules(), CondaSearch(environ={"PATH": ""}, home=tmp_path, root=tmp_path / "no")
        local = LocalEnvironments(envs_dir=tmp_path / "none", search=search, rules=rules)

        look = local.look({})

        assert isinstance(look, Look)
        assert look.ready == frozenset()


def test_use_is_remembered_outside_of_the_environment(node: Node) -> None:
    prefix = python(node.envs.parent / "operators" / "own")
    before = sorted(prefix.iterdir())

    unused = last_use(node.envs, prefix)
    mark_used(node.envs, prefix)

    assert unused is None
    assert last_use(node.envs, prefix) is not None
    assert sorted(prefix.iterdir()) == before
