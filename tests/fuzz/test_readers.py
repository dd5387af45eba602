"""Random input for everything that reads users' files: it is read or refused with a sentence, and nothing else happens.

A few examples of each in `make test`; `make fuzz` tries many more.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.argspec.client import BoundedReader
from app.domain.enums import TrainingType
from app.domain.errors import AppError, InvalidRequest
from app.domain.parameters import json_schema
from app.domain.texts import Language
from app.executor.attempts.artifacts import ArtifactProblem, check_complete, check_customized
from app.presets.catalogue import ROOM
from app.registry.base_models.card import read_card
from app.registry.base_models.findings import findings
from app.registry.datasets import files as dataset_files
from app.registry.environments.specs import parse_spec
from app.registry.methods.script_reading import script_parameters
from app.registry.models.files import UnusableFile

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**40) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


def shown(value: Any) -> bytes:
    """Return what an answer would be; fails for what cannot be one."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def has_sentences(error: AppError) -> None:
    """Fail for a refusal that says nothing."""
    assert error.detail()
    assert all(violation.detail() for violation in error.violations())


# ---- scripts --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["p", "x", "f", "args", "os", "argparse", "int", "range", "round", "sorted", "str"])
NUMBERS = st.integers() | st.integers(10**6, 10**30) | st.floats(allow_nan=False, allow_infinity=False)
ATOMS = NAMES | NUMBERS.map(repr) | st.text(max_size=6).map(repr)


OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "<<", ">>", "|", "&", "==", "<", "in"]


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    some = st.lists(inner, max_size=4).map(", ".join)
    return st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map("({0[0]} {0[1]} {0[2]})".format),
        st.builds("[{}]".format, some),
        st.builds("{{{}}}".format, some),
        st.builds("{}({})".format, inner, some),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("(lambda x: {})".format, inner),
        st.builds("[{} for x in {}]".format, inner, inner),
        st.builds("{}.join({})".format, inner, inner),
    )


EXPRESSIONS = st.recursive(ATOMS, _compound, max_leaves=12)
STATEMENTS = st.one_of(
    st.builds("x = {}".format, EXPRESSIONS),
    st.builds("x += {}".format, EXPRESSIONS),
    st.builds("p.add_argument('--x', default={}, choices={})".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("p.add_argument({}, type={}, nargs={})".format, EXPRESSIONS, EXPRESSIONS, EXPRESSIONS),
    st.builds("p.add_argument('--y', help={}, action={})".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("p.set_defaults(x={})".format, EXPRESSIONS),
    st.builds("def f(x={}): return {}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("if {}: x = {}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("for x in {}: f({})".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("class C({}): x = {}".format, EXPRESSIONS, EXPRESSIONS),
    EXPRESSIONS,
)
SHIPPED = [
    file.read_text("utf-8").splitlines() for file in ROOM.rglob("*.py") if b"ArgumentParser" in file.read_bytes()
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Return a shipped script with some of its lines gone, moved or replaced."""
    lines = list(draw(st.sampled_from(SHIPPED)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                del lines[at : at + draw(st.integers(1, 5))]
            case 1:
                lines.insert(at, lines[draw(st.integers(0, len(lines) - 1))])
            case 2:
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
            case _:
                lines.insert(at, draw(STATEMENTS))
        lines = lines or [""]
    return "\n".join(lines)


WRITTEN = st.lists(STATEMENTS, max_size=12).map(
    lambda lines: "\n".join(["import argparse, os", "p = argparse.ArgumentParser()", *lines, "p.parse_args()"])
)
SOURCES = st.one_of(WRITTEN, mutated(), st.text()).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary()


@pytest.fixture(scope="module")
def reader() -> Iterator[BoundedReader]:
    reader = BoundedReader()
    yield reader
    reader.close()


@fuzz
@given(source=SOURCES)
def test_scripts(reader: BoundedReader, source: bytes) -> None:
    reading = reader.read(source)

    script = script_parameters(reading.arguments)
    assert reading.stopped is None or reading.stopped.limit == "cpu_time", source
    assert shown(json_schema(script))
    assert shown([list(reading.imports.modules), list(reading.imports.search_path)])
    assert all(remark.violation().detail() for remark in (*script.unread, *script.notes))


# ---- data sets ------------------------------------------------------------------------------------------------------

ROWS = (
    st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "images"]), JSON, max_size=3).map(json.dumps),
        st.integers(1, 2000).map(lambda depth: '{"a": ' + "[" * depth + "]" * depth + "}"),
        st.lists(st.sampled_from(["a", "b", "c"]), max_size=500).map(
            lambda names: "{" + ", ".join(f'"{name}": 1' for name in names) + "}"
        ),
        st.text(),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary()
)


@fuzz
@given(rows=st.lists(ROWS, max_size=5))
def test_data_sets(rows: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(b"\n".join(rows))

        report = dataset_files.inspect(file, max_characters=4000).report

    assert report.problem_count >= len(report.problems)
    assert all(problem.detail() for problem in report.problems)
    assert shown(report.document())


# ---- environments ---------------------------------------------------------------------------------------------------

SPECS = st.one_of(
    st.text(),
    st.text("-:[]{}&*!|>'\"#%@, \n\\abpiyt01=", max_size=200),
    st.lists(st.text(max_size=30), max_size=5).map(lambda texts: json.dumps({"dependencies": texts})),
    st.integers(1, 3000).map(lambda depth: "dependencies: " + "[" * depth),
    st.integers(1, 9).map(lambda n: "a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(n))),
)


@fuzz
@given(text=SPECS)
def test_environment_specifications(text: str) -> None:
    try:
        parse_spec(text)
    except AppError as error:
        has_sentences(error)


# ---- models ---------------------------------------------------------------------------------------------------------

CONFIGS = st.one_of(
    st.dictionaries(
        st.sampled_from(
            ["architectures", "model_type", "hidden_size", "vocab_size", "text_config", "dtype", "quantization_config"]
        )
        | st.text(max_size=5),
        JSON | st.fixed_dictionaries({"quant_method": st.text(), "bits": JSON}),
        max_size=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.integers(1, 3000).map(lambda depth: b'{"a": ' + b"[" * depth + b"]" * depth + b"}"),
    st.binary(),
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | JSON,
        "shape": st.lists(st.integers(0, 4) | st.integers(10**30, 10**40), max_size=100) | JSON,
        "data_offsets": st.lists(st.integers(-5, 50), max_size=3) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=5), ENTRIES | JSON, max_size=4).map(lambda value: json.dumps(value).encode())
TENSORS = st.one_of(
    st.tuples(HEADERS, st.binary(max_size=60)).map(
        lambda parts: struct.pack("<Q", len(parts[0])) + parts[0] + parts[1]
    ),
    st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<Q", length) + b"{}"),
    st.binary(),
)
TOKEN = st.sampled_from(["<s>", "</s>", "<|im_end|>", ""]) | JSON
TOKENIZER_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "eos_token": TOKEN | st.fixed_dictionaries({"content": TOKEN}),
        "bos_token": TOKEN,
        "chat_template": JSON | st.text(alphabet="{}% '|<>im_endcotsf=!", max_size=80),
        "added_tokens_decoder": JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=3),
        "auto_map": JSON,
        "tokenizer_class": JSON,
    },
).map(lambda value: json.dumps(value).encode())
TOKENIZERS = st.fixed_dictionaries(
    {"model": JSON | st.fixed_dictionaries({"vocab": JSON | st.dictionaries(st.text(max_size=4), st.integers())})},
    optional={"added_tokens": JSON, "post_processor": JSON},
).map(lambda value: json.dumps(value).encode())
FILES = {
    "config.json": CONFIGS,
    "model_index.json": CONFIGS,
    "tokenizer_config.json": CONFIGS | TOKENIZER_SETTINGS,
    "tokenizer.json": CONFIGS | TOKENIZERS,
    "generation_config.json": CONFIGS,
    "pytorch_model.bin": st.binary(),
    "adapter_config.json": CONFIGS,
    "model.safetensors": TENSORS,
    "adapter_model.safetensors": TENSORS,
    "model.safetensors.index.json": CONFIGS,
}


WHOLE = {
    "config.json": b"{}",
    "model.safetensors": struct.pack("<Q", 54) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4),
}


@fuzz
@given(files=st.fixed_dictionaries({}, optional=FILES), whole=st.booleans())
def test_models(files: dict[str, bytes], whole: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if whole:  # else what is wrong with its weights is all that is ever found
            files = {key: value for key, value in files.items() if key.startswith(("token", "gen"))} | WHOLE
        for file, content in files.items():
            (folder / file).write_bytes(content)

        try:
            card = read_card(folder, roots=[])
            assert shown(card.model_dump(mode="json"))
            for training_type in TrainingType:
                for finding in findings(card, training_type):
                    assert all(shown(finding.violation.detail(language)) for language in Language)
        except AppError as error:
            has_sentences(error)
        except UnusableFile as error:
            has_sentences(InvalidRequest([error.violation]))
        for check in (check_complete, check_customized):
            with suppress(ArtifactProblem):
                check(folder)
