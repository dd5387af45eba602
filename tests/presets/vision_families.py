"""Small bases in the shapes of known families of vision-language models, and what VL-Demo's trainer holds with them.

    python vision_families.py FOLDER-OF-THE-PRESETS DATA OUTPUT

Runs in the stage's environment. Printed is for every family what its trainer learns of each answer of DATA beside what
was shown as learned, or the sentence that refuses the family: some processors need packages that are not everywhere.
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
QWEN = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% for part in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% set first = messages[0].content[0].text + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}"
    "{% for part in m.content %}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}{% endfor %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}"
    "{{ m.role | capitalize + (':' if m.content[0].type == 'image' else ': ') }}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% for part in m.content %}{{ '<IMG_CONTEXT>\\n' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    presets, data, output = map(Path, sys.argv[1:])
    sys.path.append(str(presets / "shared/helpers"))
    import torch

    torch.set_num_threads(1)
    answers = {}
    for name, build in FAMILIES.items():
        with contextlib.redirect_stdout(io.StringIO()):  # what scripts say belongs to their own output
            answers[name] = family(build, presets, data, output / name)
    json.dump(answers, sys.stdout)


def family(build: Any, presets: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Return what the trainer holds of each answer and what was said of it, after a step; or why there is none."""
    spec = importlib.util.spec_from_file_location("vl_demo", presets / "vl-demo/vl-demo.py")
    assert spec is not None
    assert spec.loader is not None
    vl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vl)
    paths = [f"--model_path={folder}", f"--dataset_path={data}", f"--output_dir={folder / 'out'}"]
    args = vl.make_parser().parse_args([*paths, f"--validation_path={data}", "--max_steps=1", "--max_image_side=0"])
    args.options = vl.Options([], vl.LIBRARY_OPTIONS, args)
    try:
        build(folder)
    except ImportError as error:
        return {"needs": str(error).strip().splitlines()[0]}
    processor = vl.pictures.load_processor(folder, args)
    vl.chat.tell_end(processor.tokenizer, vl.chat.end_turns(processor.tokenizer, folder, processor), args)
    preparation = vl.Preparation(args, vl.pictures.LEARNS)
    recipes = vl.pictures.recipes(args, vl.pictures.sizes_of(preparation, args))
    learned, shown = preparation.sequences(processor, *recipes)  # the rows for the score are the same ones
    trainer = vl.build_trainer(args, vl.llm.choose(args), processor, learned, [])
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(shown))])
    trainer.train()
    trainer.save_model(str(folder / "out"))
    answers = [
        {
            "held": [token for token in labels.tolist() if token != -100],
            "shown": one.tokens[one.start :],
            "lengths": [int(mask.sum()), len(one.tokens)],
            "text": processor.tokenizer.decode(one.tokens[one.start :]),
        }
        for one, labels, mask in zip(shown, batch["labels"], batch["attention_mask"], strict=True)
    ]
    return {"answers": answers, "end": processor.tokenizer.eos_token}


def qwen2_vl(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    words = qwen_tokenizer()
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
    config = Qwen2VLConfig(text_config=qwen_text(words), vision_config=vision, **qwen_ids(words))
    save(folder, Qwen2VLForConditionalGeneration(config), qwen_processor(Qwen2VLProcessor, words, 14))


def qwen2_5_vl(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    words = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 4}
    config = Qwen2_5_VLConfig(
        text_config=qwen_text(words), vision_config=vision | {"fullatt_block_indexes": [0]}, **qwen_ids(words)
    )
    save(folder, Qwen2_5_VLForConditionalGeneration(config), qwen_processor(Qwen2_5_VLProcessor, words, 14))


def qwen3_vl(folder: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    words = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 4}
    deep = {"deepstack_visual_indexes": [0], "num_position_embeddings": 256}
    config = Qwen3VLConfig(
        text_config=qwen_text(words, mrope_interleaved=True), vision_config=vision | deep, **qwen_ids(words)
    )
    save(folder, Qwen3VLForConditionalGeneration(config), qwen_processor(Qwen3VLProcessor, words, 16))


def qwen_tokenizer() -> Any:
    more = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return tokenizer((*CHATML, *more), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen_ids(words: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in names.items()}


def qwen_text(words: Any, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6, **more}
    return text_config(words) | {"bos_token_id": None, "rope_parameters": rope}


def qwen_processor(kind: Any, words: Any, patch: int) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    pixels = {"min_pixels": 16 * patch**2, "max_pixels": 256 * patch**2}
    video = Qwen3VLVideoProcessor if patch == 16 else Qwen2VLVideoProcessor
    return kind(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, **pixels),
        tokenizer=words,
        video_processor=video(patch_size=patch),
        chat_template=QWEN,
    )


def gemma3(folder: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *marks.values())
    words = tokenizer(special, marks, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    ids = {f"{name[:3]}_token_index": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = Gemma3Config(
        text_config=text_config(words) | {"sliding_window": 512, "query_pre_attn_scalar": 8},
        vision_config=VISION | {"image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token_index"],
        eoi_token_index=ids["eoi_token_index"],
        image_token_index=ids["ima_token_index"],
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=words,
        chat_template=GEMMA,
        image_seq_length=4,
    )
    save(folder, Gemma3ForConditionalGeneration(config), processor)


def smolvlm(folder: Path) -> None:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
    }
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", *marks.values(), *places)
    words = tokenizer(
        special, marks, eos_token="<end_of_utterance>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    config = SmolVLMConfig(
        text_config=text_config(words) | {"model_type": "llama"},
        vision_config=VISION | {"image_size": 64, "patch_size": 8},
        scale_factor=4,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    edge = {"longest_edge": 64}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size=edge),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(size=edge, max_image_size=edge, num_frames=4, fps=1),
        image_seq_len=4,
        chat_template=SMOLVLM,
    )
    save(folder, SmolVLMForConditionalGeneration(config), processor)


def internvl(folder: Path) -> None:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer((*CHATML, *marks.values()), marks, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = InternVLConfig(
        text_config=text_config(words) | {"model_type": "qwen2"},
        vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=INTERNVL,
    )
    save(folder, InternVLForConditionalGeneration(config), processor)


FAMILIES = {
    "qwen 2 vl": qwen2_vl,
    "qwen 2.5 vl": qwen2_5_vl,
    "qwen 3 vl": qwen3_vl,
    "gemma 3": gemma3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}


def tokenizer(special: tuple[str, ...], marks: dict[str, str] | None = None, **named: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=4096, extra_special_tokens=marks or {}, **named
    )


def text_config(words: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("eos", "pad", "bos")}
    return TEXT | ids | {"vocab_size": len(words)}


def save(folder: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
