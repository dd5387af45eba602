import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind, ModelState
from app.domain.kinds import STAGES
from app.domain.lifecycle import violations

ISSUE_EXAMPLE: dict[str, Any] = {
    "name": "finance-sft",
    "description": "",
    "training_type": "chat",
    "technique": "sft",
    "lifecycle": ["customized", "complete", "online"],
    "stages": {
        "training": {"file": "finance_sft.py", "conda_env": "trl"},
        "saving": {"file": "merge.py", "conda_env": "trl"},
        "inference-customized": {"file": "ask.py", "conda_env": "trl"},
    },
    "inference": {"customized": True, "complete": False},
    "deployment": {"target": "custom", "file": "deploy.py", "conda_env": "base"},
}

text = st.sampled_from(["", " ", "a.py", "trl", "custom", "ollama"]) | st.text(max_size=8)
launcher = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "kind": st.none() | st.sampled_from(["python", "torchrun", "accelerate", "mpirun", ""]),
        "processes": st.none() | st.integers(-1, 2000),
        "odd": text,
    },
)
config = st.none() | st.fixed_dictionaries(
    {}, optional={"file": st.none() | text, "conda_env": st.none() | text, "odd": text, "launcher": launcher}
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "name": st.none() | text,
        "description": st.none() | text,
        "training_type": st.none() | st.sampled_from(["chat", "video"]),
        "technique": st.none() | text,
        "lifecycle": st.none() | st.lists(st.sampled_from(["customized", "complete", "online", "base"]), max_size=4),
        "stages": st.none() | st.dictionaries(st.sampled_from([*STAGES, "odd/stage"]), config),
        "inference": st.none()
        | st.dictionaries(st.sampled_from(["customized", "complete"]), st.none() | st.booleans()),
        "deployment": st.none() | st.dictionaries(st.sampled_from(["target", "file", "conda_env"]), st.none() | text),
        "arguments": st.none() | st.dictionaries(st.just("false_as"), st.none() | text),
        "odd": st.none() | st.integers(),
    },
)


class TestParse:
    @pytest.mark.parametrize(
        "body",
        [
            [],
            "method",
            {"name": 7},
            {"lifecycle": "customized"},
            {"lifecycle": [1]},
            {"stages": []},
            {"stages": {"training": "train.py"}},
            {"stages": {"training": {"file": 1}}},
            {"inference": {"customized": "yes"}},
            {"inference": {"customized": 1}},
            {"stages": {"training": {"launcher": "torchrun"}}},
            {"stages": {"training": {"launcher": {"kind": 2}}}},
            {"stages": {"training": {"launcher": {"processes": "2"}}}},
            {"stages": {"training": {"launcher": {"processes": 2.5}}}},
            {"stages": {"training": {"launcher": {"processes": True}}}},
            {"deployment": "ollama"},
            {"arguments": {"declared_only": "no"}},
        ],
    )
    def test_refuses_wrong_json_types_only(self, body: Any) -> None:
        with pytest.raises(ValidationError):
            MethodDefinition.model_validate(body)

    def test_accepts_the_empty_object_and_leaves_it_to_the_rules(self) -> None:
        definition = MethodDefinition.model_validate({})

        assert [v.code for v in violations(definition, deploy_targets=())] == [
            "missing_name",
            "missing_training_type",
            "missing_lifecycle",
        ]

    def test_null_is_the_same_as_absent(self) -> None:
        nulls = dict.fromkeys(MethodDefinition.model_fields)

        assert MethodDefinition.model_validate(nulls) == MethodDefinition.model_validate({})

    def test_empty_object_is_present_and_null_is_not(self) -> None:
        definition = MethodDefinition.model_validate({"stages": {"training": {}, "saving": None}})

        assert definition.stage_config(JobKind.TRAINING) is not None
        assert definition.stage_config(JobKind.SAVING) is None

    def test_name_is_kept_in_normal_form(self) -> None:
        definition = MethodDefinition.model_validate({"name": "Mu\u0308ller"})

        assert definition.name == "Müller"

    def test_values_do_not_change(self) -> None:
        definition = MethodDefinition.model_validate(ISSUE_EXAMPLE)

        with pytest.raises(ValidationError, match="frozen"):
            setattr(definition, "name", "other")  # noqa: B010


class TestCanonical:
    def test_keeps_the_wire_shape(self) -> None:
        definition = MethodDefinition.model_validate(ISSUE_EXAMPLE)

        canonical = definition.canonical()

        assert canonical == {**ISSUE_EXAMPLE, "arguments": {"false_as": "False", "declared_only": False}}
        assert json.loads(json.dumps(canonical)) == canonical

    def test_leaves_no_member_out(self) -> None:
        repository = {"git": "/srv/git", "commit": "0" * 40}
        body = {**ISSUE_EXAMPLE, "data": {"learns_from": ["pair"], "tools": False}, "repository": repository}

        canonical = MethodDefinition.model_validate(body).canonical()

        assert canonical.keys() == MethodDefinition.model_fields.keys()
        assert canonical["data"] == {"learns_from": ["pair"], "tools": False, "pictures": False}

    def test_orders_stages_and_drops_what_is_absent(self) -> None:
        body = {"stages": {"saving": {"file": "s.py"}, "training": {"conda_env": None}, "inference-complete": None}}

        canonical = MethodDefinition.model_validate(body).canonical()

        assert list(canonical["stages"].items()) == [("training", {}), ("saving", {"file": "s.py"})]
        assert "deployment" not in canonical

    @given(bodies)
    def test_says_the_same_as_the_body_it_came_from(self, body: dict[str, Any]) -> None:
        definition = MethodDefinition.model_validate(body)

        again = MethodDefinition.model_validate(definition.canonical())

        assert again.canonical() == definition.canonical()
        assert violations(again, deploy_targets=("ollama",)) == violations(definition, deploy_targets=("ollama",))


class TestSwitches:
    def test_reads_the_switch_of_a_state(self) -> None:
        definition = MethodDefinition.model_validate(ISSUE_EXAMPLE)

        assert definition.switched_on(ModelState.CUSTOMIZED)
        assert not definition.switched_on(ModelState.COMPLETE)
        assert not definition.switched_on(ModelState.ONLINE)
        assert definition.deploys_itself
