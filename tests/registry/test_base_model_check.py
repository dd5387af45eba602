"""Folders that people bring as base models: what is no whole model is named for what it is, with the cure."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import TrainingType
from app.domain.errors import AppError
from app.domain.texts import Language
from app.registry.base_models.card import BaseModelCard, BaseModelKind, read_card
from app.registry.base_models.findings import LoadingPermission, Severity, findings
from app.registry.models.files import UnusableFile
from tests.api.resources import place_base_model, safetensors
from tests.base_model_folders import CHATML, model, write
from tests.registry.test_chat_templates import LLAMA3

POINTER_FILE = "version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 4976698672\n"
CHAT = TrainingType.CHAT


def card(folder: Path) -> BaseModelCard:
    return read_card(folder, roots=[folder.parent])


def refusal(folder: Path) -> str:
    try:
        card(folder)
    except UnusableFile as error:
        violation = error.violation
    except AppError as error:
        violation = error.violations()[0]
    else:
        pytest.fail("the folder was taken")
    assert all(len(sentence := violation.detail(language)) > 10 and "{" not in sentence for language in Language)
    return violation.code


def codes(found: BaseModelCard, training_type: TrainingType = CHAT, severity: Severity | None = None) -> list[str]:
    return [
        one.violation.code for one in findings(found, training_type) if severity is None or one.severity is severity
    ]


def sharded(folder: Path) -> None:
    place_base_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    placed = {"embedding": "model-00001-of-00002.safetensors", "head": "model-00002-of-00002.safetensors"}
    write(folder, model__safetensors__index__json={"weight_map": placed})


def hub_cache(folder: Path) -> None:
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    place_base_model(folder / "snapshots" / "4e0f")


def adapter(folder: Path) -> None:
    write(folder, adapter_config__json={"base_model_name_or_path": "Qwen/Qwen2.5-7B"})
    (folder / "adapter_model.safetensors").write_bytes(safetensors(a=[1]))


def adapter_with_config(folder: Path) -> None:
    adapter(folder)
    write(folder, config__json={}, tokenizer__json={})


def link_out(folder: Path) -> None:
    place_base_model(folder)
    target = folder.parents[1] / "elsewhere"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def folder_link(folder: Path) -> None:
    place_base_model(folder)
    (folder.parents[1] / "other").mkdir()
    (folder / "processor").symlink_to(folder.parents[1] / "other")


def on_top_of_model(**files: Any) -> Callable[[Path], object]:
    return lambda folder: write(place_base_model(folder), **files)


def only(**files: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, **files)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (sharded, "weights_shard_missing"),
    "adapter": (adapter, "base_model_is_adapter"),
    "adapter with the config of its base": (adapter_with_config, "base_model_is_adapter"),
    "adapter beside weights": (on_top_of_model(adapter_config__json={}), "base_model_with_adapter"),
    "adapter of mlx": (only(adapters__safetensors=safetensors(a=[1])), "base_model_is_nameless_adapter"),
    "adapter of images": (only(pytorch_lora_weights__safetensors=b"x"), "base_model_is_nameless_adapter"),
    "cache of a hub": (hub_cache, "base_model_is_hub_cache"),
    "link out of models": (link_out, "base_model_link_leaves"),
    "link to a folder": (folder_link, "model_link_to_folder"),
    "link to nothing": (
        lambda folder: (place_base_model(folder) / "vocab.json").symlink_to("gone"),
        "model_link_broken",
    ),
    "pointer for weights": (on_top_of_model(model__safetensors=POINTER_FILE), "git_lfs_pointer"),
    "pointer for pickles": (only(config__json={}, pytorch_model__bin=POINTER_FILE), "git_lfs_pointer"),
    "pointer for the configuration": (on_top_of_model(config__json=POINTER_FILE), "base_model_unreadable"),
    "cut off": (on_top_of_model(model__safetensors=safetensors(a=[9])[:-3]), "tensor_file_wrong_size"),
    "pickle cut off": (only(config__json={}, pytorch_model__bin=b"PK\x03\x04" + bytes(99)), "torch_file_cut_off"),
    "half a download": (on_top_of_model(model__safetensors__aria2=b""), "base_model_half_downloaded"),
    "configuration alone": (only(config__json={"hidden_size": 8}), "weights_missing"),
    "download that stopped": (
        lambda folder: (only(config__json={})(folder), write(folder / ".cache" / "x", y__incomplete=b"")),
        "base_model_half_downloaded",
    ),
    "no weights": (only(config__json={}, tokenizer__json={}), "weights_missing"),
    "no config": (only(model__safetensors=safetensors(a=[1])), "base_model_without_config"),
    "gguf": (only(q4__gguf=b"GGUF"), "base_model_in_other_format"),
    "gguf with config": (only(config__json={}, q4__gguf=b"GGUF"), "base_model_in_other_format"),
    "onnx": (only(config__json={}, model__onnx=b"x"), "base_model_in_other_format"),
    "flax": (only(config__json={}, flax_model__msgpack=b"x"), "base_model_in_other_format"),
    "original of Meta": (only(consolidated__00__pth=b"x", params__json={}), "base_model_in_other_format"),
    "tokenizer alone": (only(tokenizer__json={}, tokenizer_config__json={}), "base_model_is_tokenizer"),
    "optimizer alone": (only(optimizer__pt=b"x", scheduler__pt=b"x"), "base_model_is_training_state"),
    "old sentence-transformers": (
        lambda folder: (only(modules__json="[]")(folder), place_base_model(folder / "0_Transformer")),
        "base_model_in_subfolder",
    ),
    "empty": (only(README__md="x"), "base_model_is_empty"),
    "notes": (only(notes__txt="x"), "not_a_base_model"),
    "pipeline without a component": (
        only(model_index__json={"_class_name": "P", "unet": ["diffusers", "U"]}),
        "pipeline_component_missing",
    ),
}


class TestWhatIsRefused:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_is_named_for_what_it_is(self, tmp_path: Path, name: str) -> None:
        make, code = FOLDERS[name]
        folder = tmp_path / "models" / "given"
        make(folder)

        assert refusal(folder) == code

    def test_the_snapshot_of_a_cache_is_taken_and_its_links_are_its_files(self, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--tiny"
        snapshot = place_base_model(cache / "snapshots" / "4e0f")
        (cache / "blobs").mkdir()
        weights = (snapshot / "model.safetensors").rename(cache / "blobs" / "ab12")
        (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")

        found = read_card(snapshot, roots=[tmp_path])

        assert found.parameters == 80
        assert found.size_bytes == weights.stat().st_size + (snapshot / "config.json").stat().st_size

    def test_a_loop_of_links_is_no_model(self, tmp_path: Path) -> None:
        folder = place_base_model(tmp_path / "models" / "given")
        (folder / "vocab.json").symlink_to("vocab.json")
        (folder / "up").symlink_to("..")

        assert refusal(folder) == "model_link_broken"

    def test_names_need_not_be_text(self, tmp_path: Path) -> None:
        folder = place_base_model(tmp_path / "models" / "given")
        (folder / os.fsdecode(b"\xfc.json")).symlink_to("gone")

        assert refusal(folder) == "model_link_broken"


class TestWhatIsTaken:
    def test_a_whole_model_has_nothing_to_say(self, tmp_path: Path) -> None:
        found = card(model(tmp_path / "tiny"))

        assert findings(found, CHAT) == []
        assert (found.tokenizer_size, found.embedding_rows, found.weight_dtypes) == (10, 10, ("F16",))
        assert (found.turn_end, found.stop_tokens) == ("<|im_end|>", ("<|im_end|>",))

    def test_a_configuration_alone_is_for_methods_that_make_their_weights(self, tmp_path: Path) -> None:
        found = card(write(tmp_path / "tiny", config__json={"features": 8}))

        assert found.kind is BaseModelKind.DESCRIPTION
        assert [codes(found, one) for one in TrainingType] == [[]] * len(TrainingType)

    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            (None, {}, ["base_model_turn_does_not_stop"]),
            ({"eos_token_id": 0}, {}, ["base_model_turn_does_not_stop"]),
            ({"eos_token_id": [0, 2]}, {}, []),
            ({}, {"eos_token_id": 2}, []),
            ({"eos_token_id": 777}, {}, []),  # a token without a name: nothing is claimed
        ],
    )
    def test_a_turn_that_ends_with_another_token_than_the_model_stops_at(
        self, tmp_path: Path, generation: Any, config: Any, expected: list[str]
    ) -> None:
        folder = model(tmp_path / "tiny", eos="<|endoftext|>", **config)
        if generation is not None:
            write(folder, generation_config__json=generation)

        assert codes(card(folder), severity=Severity.WARNING) == expected

    def test_a_template_without_the_bos_that_the_tokenizer_adds(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "tiny")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, tokenizer_config__json={**settings, "bos_token": "<s>", "add_bos_token": True})

        assert codes(card(folder)) == ["base_model_template_without_bos"]

        write(folder, chat_template__jinja="{{ bos_token }}" + CHATML)
        assert codes(card(folder)) == []

    def test_reads_the_bos_from_the_post_processor(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "tiny", template=None)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": single}
        post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
        write(
            folder,
            tokenizer__json={**tokenizer, "post_processor": post},
            tokenizer_config__json={"bos_token": {"content": "<s>"}},
        )

        found = card(folder)

        assert found.adds_bos is True
        assert codes(found) == ["base_model_without_template"]

    def test_tokens_that_the_weights_do_not_know(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "tiny", eos="<eot>")
        (folder / "model.safetensors").write_bytes(safetensors(**{"model.embed_tokens.weight": [9, 4]}))

        assert codes(card(folder)) == [
            "base_model_tokens_beyond_weights", "base_model_unknown_tokens", "base_model_turn_does_not_stop",
        ]  # fmt: skip

    @pytest.mark.parametrize("content", ["{", "[]", "{}", POINTER_FILE, '{"model": ' + "[" * 100_000])
    def test_a_broken_tokenizer_refuses_types_that_need_one(self, tmp_path: Path, content: str) -> None:
        found = card(write(model(tmp_path / "tiny"), tokenizer__json=content))

        expected = "git_lfs_pointer" if content == POINTER_FILE else "tokenizer_unreadable"
        assert codes(found, severity=Severity.ERROR) == [expected]

    @pytest.mark.parametrize(
        ("config", "code"),
        [
            ({"quant_method": "gptq", "bits": 4}, "base_model_quantized"),
            ({"quant_method": "awq", "bits": 4}, "base_model_quantized"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "base_model_quantized_bitsandbytes"),
            ({"quant_method": "fp8"}, "base_model_quantized_float8"),
        ],
    )
    def test_quantized_weights_come_with_what_follows(self, tmp_path: Path, config: Any, code: str) -> None:
        assert codes(card(model(tmp_path / "tiny", quantization_config=config))) == [code]

    def test_pickles_and_code_are_refused_unless_allowed_and_the_state_of_a_training_is_told(
        self, tmp_path: Path
    ) -> None:
        folder = model(tmp_path / "tiny", auto_map={"AutoModel": "x.Y"})
        (folder / "model.safetensors").unlink()
        write(folder, pytorch_model__bin=b"\x80\x02}q\x00.", optimizer__pt=b"x")

        found = card(folder)

        assert found.weights == "pytorch"
        assert codes(found) == [
            "base_model_pickled", "base_model_has_custom_code", "base_model_has_training_state",
        ]  # fmt: skip
        assert codes(found, severity=Severity.ERROR) == ["base_model_pickled", "base_model_has_custom_code"]
        allowed = LoadingPermission(pickled_weights=True)
        wrong = [one.violation.code for one in findings(found, CHAT, allowed) if one.severity is Severity.ERROR]
        assert wrong == ["base_model_has_custom_code"]
        told = findings(found, CHAT, own_script=True)
        assert [one.severity for one in told] == [Severity.WARNING] * 3

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", {"auto_map": {"AutoModel": "other/repository--x.Y"}}),
            ("config.json", {"model_file": "x.py"}),
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}),
            ("processor_config.json", {"auto_map": {"AutoProcessor": "x.Y"}}),
            ("custom_generate/generate.py", "print(1)"),
            ("1_Part/config.json", {"auto_map": {"AutoModel": "x.Y"}}),
        ],
    )
    def test_code_is_asked_for_in_many_ways(self, tmp_path: Path, file: str, content: Any) -> None:
        folder = model(tmp_path / "tiny")
        assert not card(folder).custom_code

        (folder / file).parent.mkdir(exist_ok=True)
        before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(content if isinstance(content, str) else json.dumps({**before, **content}))

        assert card(folder).custom_code

    def test_an_encoder_answers_nothing_but_embeds(self, tmp_path: Path) -> None:
        found = card(write(model(tmp_path / "tiny", architectures=["BertModel"]), modules__json="[]"))

        assert found.library == "sentence-transformers"
        assert codes(found, TrainingType.EMBEDDING) == []
        assert codes(found) == ["base_model_answers_nothing"]

    def test_a_type_refuses_what_it_cannot_do_without(self, tmp_path: Path) -> None:
        language, drawing = card(model(tmp_path / "tiny")), tmp_path / "sd"
        write(drawing, model_index__json={"_class_name": "P", "unet": ["diffusers", "U"]})
        write(drawing / "unet", model__safetensors=safetensors(a=[1]))
        pipeline = card(drawing)

        assert codes(language, TrainingType.VISION_LANGUAGE) == ["base_model_without_processor"]
        assert codes(language, TrainingType.IMAGE_GENERATION) == ["base_model_needs_pipeline"]
        assert codes(pipeline, TrainingType.IMAGE_GENERATION) == []
        assert {tuple(codes(pipeline, one)) for one in TrainingType if one is not TrainingType.IMAGE_GENERATION} == {
            ("base_model_is_pipeline",)
        }

    def test_every_finding_has_a_whole_sentence_in_every_language(self, tmp_path: Path) -> None:
        folder = model(tmp_path / "tiny", template=LLAMA3, eos="<eot>", quantization_config={"quant_method": "x"})
        write(folder, optimizer__pt=b"x", tokenizer_config__json={"eos_token": "<eot>", "bos_token": "<s>"})

        found = [one for kind in TrainingType for one in findings(card(folder), kind)]

        for one in found:
            assert all("{" not in one.violation.detail(language) for language in Language), one
        assert found
