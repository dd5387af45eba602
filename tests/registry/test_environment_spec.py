"""environment.yml: what is read, what is refused and on which line, and what the hash depends on."""

import pytest

from app.domain.errors import InvalidRequest
from app.registry.environments.specs import (
    BASE_SPEC,
    EnvironmentSpecUnreadable,
    parse_dependency,
    parse_spec,
    spec_hash,
    version_matches,
)

FULL = """\
name: demo            # a hint only
channels:
  - conda-forge
dependencies:
  - python>=3.11,<3.14
  - conda-forge::numpy=1.26=py311h_0
  - pip
  - pip:
      - torch==2.13.0
      - --no-deps
variables:
  GREETING: hello
  LEVEL: 3
"""


class TestParseSpec:
    def test_reads_all_members(self) -> None:
        spec = parse_spec(FULL)

        assert spec.channels == ("conda-forge",)
        assert [(d.name, d.version, d.channel) for d in spec.dependencies] == [
            ("python", ">=3.11,<3.14", None),
            ("numpy", "=1.26", "conda-forge"),
            ("pip", "", None),
        ]
        assert spec.pip == ("torch==2.13.0", "--no-deps")
        assert spec.variables == (("GREETING", "hello"), ("LEVEL", "3"))

    def test_finds_package_by_name(self) -> None:
        spec = parse_spec(BASE_SPEC)

        assert spec.needs("python") is not None
        assert spec.needs("numpy") is None

    def test_accepts_empty_lists(self) -> None:
        assert parse_spec("dependencies:\nchannels:\nvariables:\n").dependencies == ()

    def test_says_line_and_column_if_text_is_no_yaml(self) -> None:
        with pytest.raises(EnvironmentSpecUnreadable) as caught:
            parse_spec("name: x\ndependencies: [python\nvariables: {}\n")

        assert caught.value.params["line"] == 3

    def test_names_every_problem_with_its_line(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            parse_spec(
                "channels: conda-forge\n"
                "dependencies:\n"
                "  - python\n"
                "  - =bad\n"
                "  -\n"
                "  - npm: [left-pad]\n"
                "  - pip: requests\n"
                "variables:\n"
                "  PATH: /bin\n"
                "  NESTED: {a: b}\n"
            )

        assert sorted((v.params["line"], v.code) for v in caught.value.violations()) == [
            (1, "environment_spec_no_list"),
            (4, "environment_spec_bad_dependency"),
            (5, "environment_spec_no_text"),
            (6, "environment_spec_installer_unknown"),
            (7, "environment_spec_no_list"),
            (9, "environment_spec_bad_variable"),
            (10, "environment_spec_no_text"),
        ]

    @pytest.mark.parametrize("text", ["- python\n", "just words\n", "name: x\n"])
    def test_refuses_what_is_no_specification(self, text: str) -> None:
        with pytest.raises(InvalidRequest):
            parse_spec(text)


class TestSpecHash:
    def test_ignores_comments_layout_and_name(self) -> None:
        assert spec_hash(parse_spec(FULL)) == spec_hash(parse_spec("# more\n" + FULL.replace("demo", "other")))

    @pytest.mark.parametrize(
        ("old", "new"), [("1.26", "1.27"), ("2.13.0", "2.13.1"), ("hello", "bye"), ("- conda-forge\n", "- other\n")]
    )
    def test_changes_with_content(self, old: str, new: str) -> None:
        assert spec_hash(parse_spec(FULL)) != spec_hash(parse_spec(FULL.replace(old, new)))


class TestParseDependency:
    @pytest.mark.parametrize(
        ("text", "version"),
        [
            ("python", ""),
            ("python=3.11", "=3.11"),
            ("python==3.11.7", "==3.11.7"),
            ("python 3.11.*", "3.11.*"),
            ("python >=3.11,<3.14", ">=3.11,<3.14"),
            ("python >= 3.11, < 3.14", ">=3.11,<3.14"),
            ("python=3.11=h1_0", "=3.11"),
            ("python 3.11.* *_cpython", "3.11.*"),
            ("python[version='>=3']", ""),
        ],
    )
    def test_splits_name_and_version(self, text: str, version: str) -> None:
        dependency = parse_dependency(text)

        assert dependency is not None
        assert (dependency.name, dependency.version) == ("python", version)

    @pytest.mark.parametrize("text", ["=3", "::", "na/me", ""])
    def test_refuses_what_names_no_package(self, text: str) -> None:
        assert parse_dependency(text) is None


class TestVersionMatches:
    @pytest.mark.parametrize(
        "constraint",
        [
            *("", "*", "=3.11", "==3.11.7", "3.11.7", "3.11.*", "=3.11.*", ">=3.11,<3.14", ">3.10", "<=3.11.7", "=3"),
            *("!=3.12.*", "~=3.11.2", "2.7|>=3"),
        ],
    )
    def test_accepts(self, constraint: str) -> None:
        assert version_matches(constraint, "3.11.7")

    @pytest.mark.parametrize(
        "constraint", ["=3.12", "==3.11", "3.11", "3.1", "3.1.*", ">=3.12", "<3.11", "!=3.11.*", "~=3.12.0", "2.7|>=4"]
    )
    def test_refuses(self, constraint: str) -> None:
        assert not version_matches(constraint, "3.11.7")
