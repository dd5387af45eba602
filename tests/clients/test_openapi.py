"""The OpenAPI document as a whole: what client generators and readers of the interactive page rely on."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from app.domain.enums import JobKind, TrainingType
from app.domain.kinds import STAGES
from app.domain.texts import Language, text
from tests.clients.document import openapi_document

METHODS = {"get", "put", "post", "patch", "delete"}
WITHOUT_BODY = {204, 304}


@dataclass(frozen=True)
class Operation:
    """One operation with its place in the document."""

    method: str
    path: str
    content: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return openapi_document(tmp_path_factory.mktemp("document"))


class TestEnums:
    def test_name_every_kind_stage_and_type(self, document: dict[str, Any]) -> None:
        schemas = document["components"]["schemas"]

        assert schemas["JobKind"]["enum"] == list(JobKind)
        assert schemas["Stage"]["enum"] == list(STAGES)
        assert schemas["TrainingType"]["enum"] == list(TrainingType)
        assert all(
            f"`{one}`" in str(schemas["MethodDefinition"]["properties"]["training_type"]) for one in TrainingType
        )


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> list[Operation]:
    found = [
        Operation(method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]
    assert len(found) > 50
    return found


class TestDocument:
    def test_is_openapi_3_1_with_what_the_standard_demands(self, document: dict[str, Any]) -> None:
        assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
        assert document["info"]["title"]
        assert document["info"]["version"]
        assert set(document) <= {"openapi", "info", "servers", "paths", "components", "security", "tags"}

    def test_every_reference_leads_somewhere(self, document: dict[str, Any]) -> None:
        references = {node["$ref"] for node in _nodes(document) if isinstance(node.get("$ref"), str)}

        assert references
        for reference in references:
            _resolve(document, reference)

    def test_every_schema_is_used(self, document: dict[str, Any]) -> None:
        used = {node["$ref"] for node in _nodes(document) if isinstance(node.get("$ref"), str)}

        unused = [name for name in document["components"]["schemas"] if f"#/components/schemas/{name}" not in used]
        assert unused == []

    def test_schema_names_read_well(self, document: dict[str, Any]) -> None:
        for name in document["components"]["schemas"]:
            assert re.fullmatch(r"[A-Z][A-Za-z]*(_[A-Z][A-Za-z]*_)?", name), name
            assert not re.search(r"-(Input|Output)$|Body_", name), name

    def test_every_schema_says_what_it_is(self, document: dict[str, Any]) -> None:
        schemas = document["components"]["schemas"]
        silent = {name for name, schema in schemas.items() if not schema.get("description")}

        assert {name for name in silent if not name.startswith("Page_")} == set()


class TestOperations:
    def test_ids_are_unique_names(self, operations: list[Operation]) -> None:
        ids = [operation.content["operationId"] for operation in operations]

        assert [name for name, count in Counter(ids).items() if count > 1] == []
        assert [name for name in ids if not re.fullmatch(r"[a-z]+(_[a-z]+)+", name)] == []

    def test_have_tag_summary_and_description(self, operations: list[Operation]) -> None:
        for operation in operations:
            assert operation.content["tags"], operation
            assert operation.content["summary"], operation
            assert operation.content["description"], operation

    def test_parameters_of_the_path_are_declared(self, operations: list[Operation]) -> None:
        for operation in operations:
            declared = {
                parameter["name"] for parameter in operation.content.get("parameters", ()) if parameter["in"] == "path"
            }
            assert declared == set(re.findall(r"{(\w+)}", operation.path)), operation

    def test_parameters_are_declared_once_with_a_schema(self, operations: list[Operation]) -> None:
        for operation in operations:
            parameters = operation.content.get("parameters", [])
            keys = [(parameter["in"], parameter["name"]) for parameter in parameters]
            assert len(keys) == len(set(keys)), operation
            assert all(parameter["schema"] for parameter in parameters), operation
            assert all(parameter.get("required") for parameter in parameters if parameter["in"] == "path"), operation

    def test_answers_have_a_typed_body(self, operations: list[Operation]) -> None:
        for operation in operations:
            for status, answer in operation.content["responses"].items():
                if int(status) < 300 and int(status) not in WITHOUT_BODY:
                    schemas = [content.get("schema") for content in answer["content"].values()]
                    assert schemas, f"{operation} {status}"
                    assert all(schemas), f"{operation} {status}"

    def test_requests_have_examples(self, operations: list[Operation], document: dict[str, Any]) -> None:
        bodies = [
            (operation, content)
            for operation in operations
            for content in operation.content.get("requestBody", {}).get("content", {}).values()
        ]

        assert len(bodies) > 10
        for operation, content in bodies:
            assert "example" in content or _has_example(document, content["schema"]), operation


class TestErrors:
    def test_are_problems_with_an_example_of_each_code(self, operations: list[Operation]) -> None:
        for operation in operations:
            errors = {status: answer for status, answer in operation.content["responses"].items() if int(status) >= 400}
            assert {"403", "500"} <= set(errors), operation
            for status, answer in errors.items():
                content = answer["content"]["application/problem+json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, f"{operation} {status}"
                for code, example in content["examples"].items():
                    assert example["value"]["code"] == code, f"{operation} {status}"
                    assert example["value"]["status"] == int(status), f"{operation} {status}"
                    assert example["value"]["detail"], f"{operation} {status}"

    def test_codes_have_their_texts(self, operations: list[Operation]) -> None:
        codes = {
            code
            for operation in operations
            for status, answer in operation.content["responses"].items()
            if int(status) >= 400
            for code in answer["content"]["application/problem+json"]["examples"]
        }

        assert len(codes) > 40
        for code in codes:
            assert text(code, Language.EN), code

    def test_what_takes_a_name_can_be_unknown(self, operations: list[Operation]) -> None:
        reads = [operation for operation in operations if operation.method == "get" and "{" in operation.path]

        assert [str(operation) for operation in reads if "404" not in operation.content["responses"]] == []

    def test_changes_demand_and_check_the_etag(self, operations: list[Operation]) -> None:
        guarded = [
            operation
            for operation in operations
            if any(parameter["name"] == "If-Match" for parameter in operation.content.get("parameters", ()))
        ]

        assert guarded
        for operation in guarded:
            assert {"412", "428"} <= set(operation.content["responses"]), operation


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for member in value.values():
            yield from _nodes(member)
    elif isinstance(value, list):
        for member in value:
            yield from _nodes(member)


def _resolve(document: dict[str, Any], reference: str) -> dict[str, Any]:
    assert reference.startswith("#/"), reference
    node: Any = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    assert isinstance(node, dict)
    return node


def _has_example(document: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Say whether a reader can see what to send: an example of the whole, of every required member, or of one."""
    if "$ref" in schema:
        return _has_example(document, _resolve(document, schema["$ref"]))
    if schema.keys() & {"example", "examples", "default", "const", "enum"}:
        return True
    for variants in ("anyOf", "allOf", "oneOf"):
        if any(_has_example(document, variant) for variant in schema.get(variants, ())):
            return True
    if schema.get("type") == "array":
        return _has_example(document, schema["items"])
    members = schema.get("properties", {})
    required = schema.get("required")
    if required:
        return all(_has_example(document, members[name]) for name in required)
    return any("examples" in member for member in members.values())
