"""Models, data sets and specifications that are made to hold up whoever reads them: refused, or read up to a limit."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from app.executor.attempts.artifacts import ArtifactProblem, check_complete, check_safetensors
from app.registry.base_models.card import BaseModelUnreadable, read_card
from app.registry.datasets.check import check_lines
from app.registry.environments.specs import (
    MAX_SPEC_CHARACTERS,
    EnvironmentSpecTooLong,
    EnvironmentSpecUnreadable,
    parse_spec,
)
from app.registry.models.files import UnusableFile, read_json_object

MIB = 1024 * 1024


def tensor_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def tensor(shape: Any, end: int = 4) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


class TestModels:
    @pytest.mark.parametrize(
        "content",
        [b'{"a": ' + b"[" * 100_000, b" " * (5 * MIB), b"\xff", b"[]", b'{"a": ' + b"9" * 10_000 + b"}"],
        ids=["deep", "large", "binary", "list", "digits"],
    )
    def test_a_configuration_that_is_no_small_object_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)

        with pytest.raises(BaseModelUnreadable):
            read_card(tmp_path, roots=[])
        with pytest.raises(ArtifactProblem):
            check_complete(tmp_path)

    @pytest.mark.parametrize("shape", [[10] * 100_000, [10**4000] * 3, [2**62] * 3, "4", [-1], [True, 1.5]])
    def test_a_shape_that_no_tensor_has_is_not_multiplied(self, tmp_path: Path, shape: Any) -> None:
        (tmp_path / "config.json").write_text("{}")
        file = tensor_file(tmp_path / "model.safetensors", tensor(shape), bytes(4))

        with pytest.raises(UnusableFile):
            read_card(tmp_path, roots=[])
        with pytest.raises(ArtifactProblem):
            check_safetensors(file)

    def test_numbers_of_a_configuration_fit_into_64_bits(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 10**400, "vocab_size": 7}))
        tensor_file(tmp_path / "model.safetensors", tensor([1]), bytes(4))

        card = read_card(tmp_path, roots=[])

        assert (card.hidden_size, card.vocabulary) == (None, 7)

    def test_headers_are_read_up_to_a_limit(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        tensor_file(tmp_path / "large.safetensors", tensor([1]) + b" " * (20 * MIB), bytes(4))

        with pytest.raises(UnusableFile, match="4 MiB"):
            read_card(tmp_path, roots=[])
        with pytest.raises(ArtifactProblem, match="16 MiB"):
            check_safetensors(tmp_path / "large.safetensors")

    def test_what_is_no_regular_file_is_not_waited_for(self, tmp_path: Path) -> None:
        pipe, device = tmp_path / "pipe.safetensors", tmp_path / "device.safetensors"
        os.mkfifo(pipe)
        device.symlink_to("/dev/zero")

        for path in (pipe, device):
            with pytest.raises(ArtifactProblem, match="no regular file"):
                check_safetensors(path)
            with pytest.raises(UnusableFile, match="no regular file"):
                read_json_object(path, max_bytes=10)


class TestDataSets:
    def problems(self, *lines: bytes) -> list[str]:
        return [problem.code for problem in check_lines(enumerate(lines, start=1), max_characters=10_000_000).problems]

    def test_rows_are_nested_as_deeply_as_answers_can_be(self) -> None:
        assert self.problems(b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}") == []
        assert self.problems(b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}") == ["line_not_json"]
        assert self.problems(b'{"a": ' + b'{"b": ' * 900 + b"1" + b"}" * 900 + b"}") == ["line_not_json"]
        assert self.problems(b'{"a": ' + b"[" * 100_000 + b"}") == ["line_not_json"]
        assert self.problems(b'{"a": [' + b"[]," * 1000 + b"[]]}") == []

    def test_the_repeated_one_of_many_fields_is_found_at_once(self) -> None:
        names = [f'"{n}": 1' for n in range(200_000)]

        assert self.problems("{{{}}}".format(", ".join([*names, '"199999": 2'])).encode()) == ["line_duplicate_key"]


class TestEnvironments:
    @pytest.mark.parametrize(
        "text",
        ["dependencies: " + "[" * 5_000, "- " * 5_000, "{" * 5_000, '"\\UFFFFFFFF"', '"\\uD800'],
        ids=["list", "items", "mapping", "character", "half"],
    )
    def test_what_no_reader_of_yaml_takes_is_refused(self, text: str) -> None:
        with pytest.raises(EnvironmentSpecUnreadable):
            parse_spec(text)

    def test_longer_than_anybody_writes(self) -> None:
        with pytest.raises(EnvironmentSpecTooLong):
            parse_spec("#" * (MAX_SPEC_CHARACTERS + 1))

    def test_aliases_are_not_multiplied(self) -> None:
        bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))

        spec = parse_spec(f"{bomb}dependencies: [python]\n")

        assert [dependency.name for dependency in spec.dependencies] == ["python"]
