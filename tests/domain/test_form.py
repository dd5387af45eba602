"""The form and the rules say the same, for every combination."""

from itertools import product
from typing import Any

import pytest

from app.domain.definition import MethodDefinition
from app.domain.form import Condition, FormField, FormPath, method_form
from app.domain.lifecycle import PATHS, violations
from app.domain.texts import Language

TARGETS = ("ollama",)
FORM = method_form(deploy_targets=TARGETS, environments=("base", "trl"))
BASE: dict[str, Any] = {"name": "m", "training_type": "chat"}
LEAVES = [
    *(f"/stages/{stage}/{member}" for stage in ("training", "saving") for member in ("file", "conda_env")),
    "/stages/inference-customized",
    "/stages/inference-complete",
]


def value_at(body: dict[str, Any], at: str) -> Any:
    value: Any = body
    for part in at.split("/")[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def put(body: dict[str, Any], at: str, value: Any) -> None:
    *parents, last = at.split("/")[1:]
    for part in parents:
        body = body.setdefault(part, {})
    body[last] = value


def holds(condition: Condition | None, body: dict[str, Any]) -> bool:
    if condition is None:
        return False
    value = value_at(body, condition.pointer)
    if condition.one_of is not None:
        return value in condition.one_of
    return bool(value) if condition.equals is None else value == condition.equals


def required(field: FormField, body: dict[str, Any]) -> bool:
    return field.required or holds(field.required_when, body)


def accepted_by_form(path: FormPath, body: dict[str, Any], filled: list[str]) -> bool:
    """Judge a body as a frontend would that knows only the form."""
    fields = {field.pointer: field for field in path.fields}
    if any(pointer not in fields for pointer in filled):
        return False
    if any(fields[p].allowed_when and not holds(fields[p].allowed_when, body) for p in filled):
        return False
    return all(field.pointer in filled for field in path.fields if required(field, body))


def bodies(path: FormPath) -> Any:
    """Yield every way to fill in the fields: leaves of stages, switches, deployments."""
    deployments = [{}, {"target": "ollama"}, {"target": "custom"}, {"target": "custom", "file": "d.py"}]
    deployments += [{"target": t, "file": "d.py", "conda_env": "base"} for t in ("custom", "ollama")]
    for given in product((False, True), repeat=len(LEAVES)):
        for customized, complete in product((False, True), repeat=2):
            for deployment in deployments:
                body: dict[str, Any] = {**BASE, "lifecycle": list(path.lifecycle)}
                filled: list[str] = []
                for leaf, present in zip(LEAVES, given, strict=True):
                    members = [leaf] if leaf.count("/") == 3 else [f"{leaf}/file", f"{leaf}/conda_env"]
                    filled += members if present else []
                filled += [f"/deployment/{member}" for member in deployment]
                filled += ["/inference/customized"] if customized else []
                filled += ["/inference/complete"] if complete else []
                for pointer in filled:
                    value = True if pointer.startswith("/inference/") else deployment.get(pointer.split("/")[-1], "x")
                    put(body, pointer, value)
                yield body, filled


class TestFormAndRules:
    @pytest.mark.parametrize("path", FORM.lifecycles, ids=lambda path: path.text)
    def test_agree_on_every_combination(self, path: FormPath) -> None:
        count = valid = 0

        for body, filled in bodies(path):
            found = violations(MethodDefinition.model_validate(body), deploy_targets=TARGETS)
            assert (not found) is accepted_by_form(path, body, filled), (body, found)
            count += 1
            valid += not found

        assert count == 2**6 * 4 * 6
        assert valid > 0

    @pytest.mark.parametrize("path", FORM.lifecycles, ids=lambda path: path.text)
    def test_stars_are_what_an_empty_method_lacks(self, path: FormPath) -> None:
        empty = MethodDefinition.model_validate({**BASE, "lifecycle": list(path.lifecycle)})

        lacking = {violation.pointer for violation in violations(empty, deploy_targets=TARGETS)}

        assert lacking == {field.pointer for field in path.fields if field.required}

    def test_stars_of_the_common_fields(self) -> None:
        lacking = {v.pointer for v in violations(MethodDefinition.model_validate({}), deploy_targets=TARGETS)}

        assert lacking == {field.pointer for field in FORM.fields if field.required}


class TestForm:
    def test_has_the_six_paths_in_order(self) -> None:
        assert [tuple(path.lifecycle) for path in FORM.lifecycles] == list(PATHS)
        assert FORM.lifecycles[3].label[Language.ZH] == "定制模型 → 完整模型 → 上线模型"

    def test_lists_targets_and_environments(self) -> None:
        assert [choice.value for choice in FORM.deploy_targets] == ["ollama", "custom"]
        assert FORM.environments == ["base", "trl"]

    def test_everything_has_its_label_in_three_languages(self) -> None:
        fields = [*FORM.fields, *(field for path in FORM.lifecycles for field in path.fields)]
        choices = [*FORM.training_types, *FORM.techniques, *FORM.states, *FORM.stages, *FORM.deploy_targets]
        choices += FORM.launchers
        texts = [*(f.label for f in fields), *(f.help for f in fields), *(c.label for c in choices)]

        for entry in texts:
            assert set(entry) == set(Language)
            assert not any(text.startswith(("label_", "help_")) for text in entry.values())

    def test_is_json(self) -> None:
        assert FORM.model_dump(mode="json")["lifecycles"][0]["lifecycle"] == ["customized"]
