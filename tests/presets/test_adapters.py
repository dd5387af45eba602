"""Every kind of adapter learns, is saved, loaded and merged; new tokens with it; what cannot be trained is refused."""

import importlib
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets.conftest import NewHome

UNMERGED = {"beft", "lily", "p_tuning", "prefix_tuning", "prompt_tuning"}
WITH_TOKENS = {"tokens", "tokens of adalora, untied", "tokens of dora, untied"}
FLOATS = 1e-3
"""What a logit of some units may differ by where weights are merged in float32."""


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return what imports a helper of the scripts."""
    monkeypatch.syspath_prepend(str(catalogue.helpers_dir()))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith(("deepe", "enums")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def found(new_home: NewHome, tiny_base: Any) -> dict[str, Any]:
    home = new_home("adapters")
    shutil.copy(Path(__file__).with_name("adapters_probe.py"), home.scripts)
    paths = (catalogue.helpers_dir(), home.scripts, tiny_base, home.path / "probe")

    run = home.run("adapters_probe.py", *map(str, paths))

    assert run.code == 0, run.stderr
    (answer,) = [line[6:] for line in run.stdout.splitlines() if line.startswith("found ")]
    answers: dict[str, Any] = json.loads(answer)
    assert not {name: one["error"] for name, one in answers.items() if "error" in one}
    return answers


@pytest.mark.training
@pytest.mark.xdist_group("adapters")
class TestEveryKind:
    def test_learns_and_is_loaded_as_it_was(self, found: dict[str, Any]) -> None:
        assert not {name: one["losses"] for name, one in found.items() if min(one["losses"]) >= one["losses"][0]}
        assert not {name: one["changed"] for name, one in found.items() if one["changed"] < 100 * FLOATS}
        assert not {name: one["loaded"] for name, one in found.items() if one["loaded"] > FLOATS}

    def test_merged_model_answers_as_the_adapter(self, found: dict[str, Any]) -> None:
        assert {name for name, one in found.items() if "refused" in one} == UNMERGED
        assert all("cannot be merged; use the customized model" in found[name]["refused"] for name in UNMERGED)
        assert not {name: one["merged"] for name, one in found.items() if one.get("merged", 0) > FLOATS}

    def test_new_tokens_are_learned_saved_and_merged_and_no_others(self, found: dict[str, Any]) -> None:
        for name in WITH_TOKENS:
            rows, changed = found[name]["rows"]
            assert len(rows) == 2
            assert changed == [True, True]
            assert found[name]["others"]
            assert found[name]["source"]
            assert found[name]["bytes"] < found["lora"]["bytes"] * 2  # no whole tables
        assert found["tokens"]["text"].startswith("<go>")
        assert "<go>" not in found["tokens of dora, untied"]["text"]


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "lacks", "said"),
        [
            ({"adapter": "p_tuning"}, ("prompts",), "adapter=p_tuning trains tokens before the question"),
            ({"adapter": "adalora"}, ("ranks",), "adapter=adalora moves ranks between layers"),
            ({"adapter": "olora"}, ("base",), "no base is left for this method to compare with"),
            ({"init_lora_weights": "pissa"}, ("base",), "init_lora_weights=pissa takes its start out of the weights"),
            (
                {"init_lora_weights": "eva"},
                (),
                "made in a step of its own, which the training does not make",
            ),
            ({"init_lora_weights": "pissa_niter_4"}, (), "give another start, such as pissa or olora"),
            ({"adapter": "boft", "load_in_4bit": True}, (), "adapter=boft cannot be trained on a base model in 4 bits"),
            ({"adapter": "loha", "lora_dropout": 0.1, "rank_dropout": 0.1}, (), "both set the dropout of adapter=loha"),
            ({"adapter": "rslora", "use_rslora": False}, (), "adapter=rslora and use_rslora=False contradict"),
        ],
    )
    def test_kind_that_a_method_cannot_train(
        self, helpers: Any, given: dict[str, Any], lacks: tuple[str, ...], said: str
    ) -> None:
        kinds = helpers("deepe_adapter_kinds")
        own = ("adapter", "load_in_4bit", "lora_dropout")
        options = {name: value for name, value in given.items() if name not in own}
        args = Namespace(
            adapter="lora", train_id="1", seq=1, max_steps=None, options=Namespace(given=options, check=dict)
        )
        for name in given.keys() - options.keys():
            setattr(args, name, given[name])

        with pytest.raises(kinds.Refused) as refusal:
            kinds.check_adapter(args, lacks=lacks)

        assert said in str(refusal.value)

    def test_kinds_of_the_form_are_those_of_the_table(self, helpers: Any) -> None:
        kinds = helpers("deepe_adapter_kinds")
        named = [kind for when in kinds.CLASSES.values() for kind in when["adapter"]]

        assert list(kinds.KINDS) == helpers("deepe_arguments").ADAPTERS
        assert sorted(named) == sorted(kinds.KINDS)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"new_tokens": "nowhere"}, "or a file with one token in each line; nowhere cannot be read"),
            ({"new_tokens": "[1,"}, "new_tokens is not valid JSON"),
            ({"new_tokens": '["a b "]'}, "'a b ' is no token"),
            ({"adapter": "vera"}, "adapter=vera cannot learn embeddings; these can: lora, rslora"),
            ({"finetuning_type": "freeze"}, "finetuning_type=freeze does not train embeddings"),
            ({"finetuning_type": "full"}, "a second copy of the base model, which does not know them"),
            ({"distributed_strategy": "fsdp2"}, "embeddings cannot grow where fsdp2 divides them"),
            ({"adapter_name_or_path": "x"}, "the adapter to go on from learns on with its own tokens"),
        ],
    )
    def test_tokens_that_cannot_be_learned(self, helpers: Any, given: dict[str, Any], said: str) -> None:
        tokens = helpers("deepe_tokens")
        args = Namespace(**{"new_tokens": '["<go>"]', "adapter": "lora", "train_id": "1", "seq": 1} | given)

        with pytest.raises(tokens.Refused) as refusal:
            tokens.check_tokens(args, copies_base=True)

        assert said in str(refusal.value)
