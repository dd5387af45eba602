"""VL-Demo, training: teach a vision-language model to answer questions about pictures, with LoRA and TRL's SFTTrainer.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about two minutes):

    python app/presets/vl-demo/tiny_vl.py --output tiny-vl
    python -m app.presets.sample_data vl-data
    python app/presets/vl-demo/vl-demo.py --model_path=tiny-vl --dataset_path=vl-data/vl-demo --output_dir=vl-out \
        --max_steps=100 --batch_size=16 --learning_rate=0.006

A data set is a folder with one JSONL file and the folder `images`; `pic_relative_path` names another one. A row has one
picture or several, a question and an answer:

| pictures | words |
|---|---|
| `"images": [{"imageId": "a.png"}, {"imageId": "b.png"}]`, also `["a.png", "b.png"]` | `prompt` and `completion` |
| `"image": "a.png"` | `question` and `answer`, also with the columns in `input_train_name` and `output_train_name` |
| `"file_name": "a.png"` | `messages` or `conversations`, with texts or with parts |

`<image>` in a text (in messages also a part of the type `image`) says where a picture belongs; without it, all pictures
come before the first question. All pictures are read once at the start, so that a broken one is named at once.

The vision tower stays as it is and LoRA adapts the language model; `train_vision` adapts both. `output_dir` holds the
adapter, the processor and, in `deepe-pictures.json`, the size of the pictures. A run that was stopped goes on from the
newest checkpoint.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe_arguments as arguments
import deepe_chat as chat
import deepe_llm as llm
import deepe_pictures as pictures
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, prepare_adapter
from deepe_log import log
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_recipes import Learned, written_value
from deepe_rows import Answer, Refused, Rendered
from deepe_scores import evaluation_settings, greedy_answers, over_tokens, report_right, score_loss, to_answer
from deepe_tokens import check_tokens

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {"trl.SFTConfig": {}, **CLASSES},
    "instead": {"max_length": "max_input_length and max_content_length", "packing": "", "padding_free": ""},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a vision-language model.", allow_abbrev=False)
    arguments.add_job(parser, model_name="vl-demo", dataset="folder with one JSONL file and the pictures, or the file")
    data = arguments.add_rows(parser, columns=("the question", "the answer"))
    data.add_argument("--pic_relative_path", default=None, help="folder of the pictures; empty takes images")
    data.add_argument("--max_image_side", type=int, default=1024, help="larger pictures are shrunk to it; 0 does not")
    arguments.add_lengths(data, of_input="a question with its pictures", of_output="an answer", input_tokens=2048)
    arguments.add_template(data)
    arguments.add_tokens(data)
    arguments.add_workers(data)
    adapter = parser.add_argument_group("adapter")
    arguments.add_adapter(adapter)
    adapter.add_argument(
        "--train_vision", type=arguments.str2bool, default=False, help="adapt the vision tower as well"
    )
    arguments.add_steps(parser, batch_size=4, learning_rate=2e-4)
    machine = parser.add_argument_group("memory and speed")
    arguments.add_memory(machine)
    machine.add_argument("--picture_workers", type=int, default=-1, help="processes that read pictures; -1 decides")
    arguments.add_held_out(arguments.add_watch(parser))
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, pictures.LEARNS)
    sizes = pictures.sizes_of(preparation, args)

    log("InitializingModel", args.model_path, args)
    machine = llm.choose(args)
    processor = pictures.load_processor(Path(args.model_path), args)
    chat.tell_end(processor.tokenizer, chat.end_turns(processor.tokenizer, Path(args.model_path), processor), args)
    learned, asked = preparation.sequences(processor, *pictures.recipes(args, sizes))
    trainer = build_trainer(args, machine, processor, learned, asked)

    score(trainer, processor, asked, args, "before")
    llm.train(trainer, preparation.rows, args)
    pictures.write_size(Path(args.output_dir), args.max_image_side)
    llm.save_adapter(trainer, args)
    score(trainer, processor, asked, args, "after")
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    check_adapter(args, lacks=("prompts",))
    llm.check(args)
    check_tokens(args)
    if args.max_image_side < 0:
        raise Refused(f"max_image_side must be at least 0, it is {args.max_image_side}")
    if args.picture_workers < -1:
        raise Refused(f"picture_workers must be at least -1, it is {args.picture_workers}")


def build_trainer(
    args: argparse.Namespace,
    machine: llm.Machine,
    processor: Any,
    learned: Learned,
    held_out: list[Rendered],
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText
    from trl import SFTConfig, SFTTrainer

    checkpointing = llm.plan_memory(args, machine, learned.longest)
    model = llm.load_model(args, machine, processor.tokenizer, AutoModelForImageTextToText)
    model.config.use_cache = False
    layers = llm.linear_layers(model) if args.train_vision else pictures.language_layers(model)
    workers = args.picture_workers
    config = options_of(args).build(
        SFTConfig,
        max_length=None,  # nothing is cut: what is too long was left out
        remove_unused_columns=False,  # what is in a row is only known when it is read
        dataloader_num_workers=workers if workers >= 0 else 4 if machine.device == "cuda" else 0,
        **evaluation_settings(args, held_out),
        **llm.trainer_settings(args, machine, checkpointing=checkpointing),
    )
    shown = partial(pictures.rows_for_trl, most=args.max_image_side)
    measured = Dataset.from_dict({"example": [written_value(one.example) for one in held_out]}).with_transform(shown)
    with options_of(args).refusing():
        trainer = over_tokens(SFTTrainer)(
            model=model,
            args=config,
            train_dataset=learned.dataset(shown),
            eval_dataset=measured if held_out else None,
            processing_class=processor,
            peft_config=adapter_config(args, model, layers, rows=len(learned)),
            callbacks=llm.callbacks(args),
        )
    prepare_adapter(args, trainer)
    trained, whole = trainer.model.get_nb_trainable_parameters()
    adapted = "language model and vision tower" if args.train_vision else "language model"
    print(
        f"{args.adapter} trains {trained:,} weights in the {adapted} beside {whole - trained:,} fixed ones", flush=True
    )
    return trainer


def score(trainer: Any, processor: Any, asked: list[Rendered], args: argparse.Namespace, phase: str) -> None:
    """Report the held-out loss, and how many questions get exactly the wanted answer; the others wait for rank 0."""
    score_loss(trainer, phase)

    def encode(_tokenizer: Any, some: list[Answer]) -> Any:
        shown = [pictures.pictures_of(answer, args.max_image_side) for answer in some]
        return pictures.encode(processor, [answer.prompt for answer in some], shown)

    if asked and trainer.is_world_process_zero():
        answered = to_answer(asked, processor.tokenizer, args)
        given = greedy_answers(
            trainer.model,
            processor.tokenizer,
            [one.example for one in answered],
            args.eval_max_new_tokens,
            encode,
            at_once=args.batch_size,
        )
        prompts = [pictures.prompt_text(processor, one.example.prompt) for one in answered]
        report_right(prompts, given, asked, processor.tokenizer, args, phase)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
