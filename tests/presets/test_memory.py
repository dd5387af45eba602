"""The forecast of a training's memory, against what torch keeps for it."""

import json
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from app.presets.shared.helpers.deepe_memory import (
    Base,
    Head,
    Step,
    Unforeseeable,
    base_of,
    cure,
    forecast,
    read_base,
    recomputes,
    refusal,
    step_of,
)
from app.presets.shared.helpers.deepe_memory.fitting import same_step
from tests.presets.conftest import NewHome
from tests.presets.stage import TORCH, dataset, demo_parameters

GIB = 2**30
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
TOO_LOW, TOO_HIGH = 0.95, 1.30
"""How far a forecast may be from what is measured."""


@pytest.fixture(scope="module")
def measured(training_python: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Return what the probe measured of small models."""
    output = tmp_path_factory.mktemp("memory") / "measured.json"
    probe = Path(__file__).with_name("memory_probe.py")
    command = [str(training_python), str(probe), str(catalogue.ROOM), str(tiny_base), str(output)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(output.parent), **TORCH}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.training
@pytest.mark.xdist_group("memory")
class TestMeasured:
    def test_activations_of_each_family_are_forecast(self, measured: Mapping[str, Any]) -> None:
        off = {}
        for case in measured["activations"]:
            memory = forecast(base_of(case["config"]), Step(**case["step"]))
            off[f"{case['name']} {case['step']}"] = (memory.activations + memory.attention) / case["bytes"]

        assert len(off) == 20
        assert {name: ratio for name, ratio in off.items() if not TOO_LOW <= ratio <= TOO_HIGH} == {}

    def test_peaks_of_steps_with_logits_are_forecast(self, measured: Mapping[str, Any]) -> None:
        off = {}
        for case in measured["peaks"]:
            step = Step(**{"rows": 0, "tokens": 0} | case["step"] | {"head": Head(case["step"]["head"])})
            if shapes := case.get("shapes"):
                rows, tokens = shapes[0]
                if case["name"] == "orpo":  # a tensor for either answer
                    rows = 2 * rows
                elif case["name"] == "grpo":  # one for the questions and one for the answers
                    tokens = sum(width for _rows, width in shapes)
                step = replace(step, rows=rows, tokens=tokens)
            memory = forecast(base_of(case["config"]), step)
            peak = memory.activations + memory.attention + memory.gradients + memory.logits
            off[f"{case['name']} {case['step']}"] = peak / case["bytes"]

        assert {name.split(" {")[0] for name in off} == {
            *("sft", "dpo", "kto", "orpo", "grpo", "ppo", "custom02", "sft beyond a tile"),
        }
        assert {name: ratio for name, ratio in off.items() if not TOO_LOW <= ratio <= TOO_HIGH} == {}


class TestBase:
    def test_dense_model_has_the_weights_of_its_configuration(self) -> None:
        assert base_of(LLAMA_8B).weights == pytest.approx(8.03e9, rel=0.01)

    def test_text_part_of_a_model_with_pictures_is_taken(self) -> None:
        config = {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280}, "text_config": LLAMA_8B}

        assert base_of(config) == base_of(LLAMA_8B)

    def test_mixture_has_all_experts_and_computes_with_some(self) -> None:
        mixture = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
        base = base_of(LLAMA_8B | mixture | {"hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
                                             "moe_intermediate_size": 768, "num_key_value_heads": 4,
                                             "vocab_size": 151936})  # fmt: skip

        assert base.weights == pytest.approx(30.5e9, rel=0.02)
        assert base.active_intermediate == 8 * 768

    def test_tied_embeddings_count_once(self) -> None:
        tied = base_of(LLAMA_8B | {"tie_word_embeddings": True})

        assert base_of(LLAMA_8B).weights - tied.weights == 4096 * 128256

    def test_missing_values_are_named(self) -> None:
        with pytest.raises(Unforeseeable, match="does not say num_hidden_layers, vocab_size"):
            base_of({name: LLAMA_8B[name] for name in LLAMA_8B if name not in ("num_hidden_layers", "vocab_size")})

    def test_headers_of_weights_are_counted(self, tmp_path: Path) -> None:
        write_base(tmp_path, LLAMA_8B, {"one": [1000, 10], "two": [7]})

        base = read_base(tmp_path)

        assert (base.weights, base.layers) == (10007, 32)

    def test_folder_without_configuration_is_not_foreseen(self, tmp_path: Path) -> None:
        with pytest.raises(Unforeseeable, match=r"config\.json cannot be read"):
            read_base(tmp_path)


class TestForecast:
    base = base_of(LLAMA_8B)

    def sft(self, **values: Any) -> Step:
        given = {"batch_size": 8, "max_seq_length": 4096, "lora_rank": 16, "gradient_checkpointing": "auto"} | values
        return step_of("sft", given, device="cuda")

    def test_checkpointing_four_bits_and_eight_bit_states_need_less(self) -> None:
        step = self.sft()
        plain = forecast(self.base, step)

        assert forecast(self.base, replace(step, checkpointing=True)).activations < plain.activations / 5
        assert forecast(self.base, replace(step, four_bit=True)).weights < plain.weights / 2
        assert forecast(self.base, replace(step, optimizer="adamw_bnb_8bit")).optimizer < plain.optimizer / 3

    def test_pairs_are_two_sequences_and_single_answers_one(self) -> None:
        values = {"batch_size": 4, "max_input_length": 512, "max_content_length": 512}

        pair, single = (
            step_of("preferences", values | {"objective": objective}, device="cpu") for objective in ("dpo", "kto")
        )

        assert (pair.rows, single.rows, pair.tokens) == (8, 4, 1024)

    def test_all_weights_need_states_for_all_of_them(self) -> None:
        step = step_of("full", {"batch_size": 1, "max_seq_length": 512}, device="cuda")

        memory = forecast(self.base, step)

        assert memory.weights + memory.gradients + memory.optimizer == 16 * self.base.weights

    def test_frozen_weights_need_no_states(self) -> None:
        full, frozen = (
            forecast(self.base, self.sft(finetuning_type=kind, freeze_trainable_layers=2))
            for kind in ("full", "freeze")
        )

        assert full.weights + full.gradients + full.optimizer == 16 * self.base.weights
        assert frozen.weights == full.weights
        assert frozen.gradients + frozen.optimizer == 12 * 2 * self.base.linear

    def test_base_lies_beside_weights_that_are_compared_with_it(self) -> None:
        values = {"batch_size": 1, "max_input_length": 64, "max_content_length": 64, "finetuning_type": "full"}

        dpo, orpo = (
            forecast(self.base, step_of("preferences", values | {"objective": objective}, device="cuda"))
            for objective in ("dpo", "orpo")
        )

        assert dpo.weights == 2 * orpo.weights

    def test_checkpointing_is_chosen_where_activations_do_not_fit(self) -> None:
        step = self.sft()
        needed = forecast(self.base, step).total

        assert not recomputes(self.base, step, "auto", 2 * needed)
        assert recomputes(self.base, step, "auto", needed)
        assert not recomputes(self.base, step, "false", needed / 2)
        assert not recomputes(self.base, replace(step, device="cpu"), "auto", needed / 2)


class TestRefusal:
    base = base_of(LLAMA_8B)
    values = {"batch_size": 8, "grad_accum_steps": 2, "max_seq_length": 4096, "gradient_checkpointing": "auto",
              "load_in_4bit": False}  # fmt: skip

    def refused(self, free: int, *, checkpointing: bool = True, base: Base | None = None, **more: Any) -> str:
        values = self.values | more
        step = replace(step_of("sft", values, device="cuda"), checkpointing=checkpointing)
        sentence = refusal(base or self.base, step, values, free)
        assert sentence is not None
        return sentence

    def test_what_fits_is_not_refused(self) -> None:
        step = replace(step_of("sft", self.values, device="cuda"), checkpointing=True)

        assert refusal(self.base, step, self.values, 80 * GIB) is None

    def test_smaller_batch_keeps_the_rows_of_a_step(self) -> None:
        sentence = self.refused(24 * GIB)

        assert "24.0 GiB are free: set batch_size to 2 and grad_accum_steps to 8, which learns the same" in sentence
        assert sentence.startswith("the training needs about 34.0 GiB (activations 15.1 GiB, weights 15.0 GiB, ")

    def test_checkpointing_that_was_switched_off_is_the_cure(self) -> None:
        sentence = self.refused(60 * GIB, checkpointing=False, gradient_checkpointing="false")

        assert sentence.endswith("are free: set gradient_checkpointing to true, which learns the same")

    def test_four_bits_are_the_cure_where_they_fit(self) -> None:
        sentence = self.refused(10 * GIB)

        assert sentence.endswith("are free: set load_in_4bit to true and batch_size to 1 and grad_accum_steps to 16")

    def test_four_bits_are_no_cure_where_the_weights_learn(self) -> None:
        assert "load_in_4bit" not in self.refused(40 * GIB, finetuning_type="full")

    def test_base_model_beyond_all_memory_needs_another(self) -> None:
        huge = base_of(LLAMA_8B | {"num_hidden_layers": 2000})

        sentence = self.refused(80 * GIB, base=huge)

        assert "take a smaller base model" in sentence
        assert "load_in_4bit" not in sentence

    def test_embedding_takes_its_batch_in_parts(self) -> None:
        values = {"batch_size": 512, "chunk_size": 0, "max_seq_length": 512, "lora_rank": 8}
        step = step_of("embedding", values, device="cuda")

        sentence = refusal(self.base, step, values, 80 * GIB)

        assert sentence is not None
        assert "set chunk_size to " in sentence
        assert "batch_size" not in sentence

    def test_batch_whose_rows_are_compared_keeps_two(self) -> None:
        values = {"batch_size": 4, "grad_accum_steps": 1, "max_input_length": 2048, "max_content_length": 2048,
                  "objective": "kto", "gradient_checkpointing": "true"}  # fmt: skip
        step = step_of("preferences", values, device="cuda")
        of_one, of_two = (forecast(self.base, replace(step, rows=rows)).total for rows in (1, 2))

        assert cure(self.base, step, values, of_two) == {"batch_size": 2, "grad_accum_steps": 2}
        assert cure(self.base, step, values, of_one) is None

    def test_reward_model_reads_two_answers_and_makes_no_logits(self) -> None:
        values = {"batch_size": 4, "max_input_length": 512, "max_content_length": 512}
        step = step_of("reward", values, device="cuda")

        assert step.rows == 8
        assert forecast(self.base, step).logits < forecast(self.base, replace(step, head=Head.FUSED)).logits

    @pytest.mark.parametrize(("most", "expected"), [(6, (6, 4)), (5, (4, 6)), (1, (1, 24)), (0, None)])
    def test_rows_of_a_step_stay_the_same(self, most: int, expected: tuple[int, int] | None) -> None:
        assert same_step(12, 2, most) == expected


@pytest.mark.training
@pytest.mark.xdist_group("memory")
def test_script_refuses_a_base_model_that_cannot_fit_before_it_is_loaded(
    new_home: NewHome, tiny_base: Path, tmp_path: Path
) -> None:
    home = new_home("memory")
    folder = tmp_path / "huge"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_base / name).is_file():
            (folder / name).write_bytes((tiny_base / name).read_bytes())
    write_base(folder, LLAMA_8B | {"num_hidden_layers": 4000}, {"all": [1_000_000, 1_000_000]})

    run = home.run(
        "sft-demo.py",
        f"--model_path={folder}",
        f"--dataset_path={dataset('sft-demo')}",
        f"--output_dir={home.path / 'out'}",
        *demo_parameters("SFT-Demo"),
    )

    assert run.code == 1
    assert run.stderr.count("\n") < 5
    assert "sft-demo.py: the training needs about " in run.stderr
    assert "weights 3725.3 GiB" in run.stderr
    assert "does not fit with batch_size 1 and gradient_checkpointing either" in run.stderr


def write_base(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> None:
    """Write a configuration and weights of which there is the header only."""
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in tensors.items()}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
