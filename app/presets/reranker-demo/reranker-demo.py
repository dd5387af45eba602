r"""Reranker-Demo, training: a cross-encoder that orders documents for a query, by sentence-transformers.

An embedding model makes a vector of each text by itself; a reranker reads query and document together, which is slower
and more exact: it orders the few documents that an embedding model has found. The base model is an encoder (BERT,
RoBERTa, ModernBERT, XLM-R, ...) that gets a head with one number, or a reranker that learns on.

| loss | learns | takes |
|---|---|---|
| binary_cross_entropy | each document by itself: does it answer the query? | labels from 0 to 1 |
| multiple_negatives_ranking | the right document among `num_negatives` wrong ones | right and wrong |
| lambda | the order of a query's documents, the top of the list most (LambdaLoss) | labels of any size |
| list_net | the whole order (ListNet) | labels of any size |
| rank_net | each two documents of different labels (RankNet) | labels of any size |

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/embedding-demo/tiny_encoder.py --output tiny-encoder
    python app/presets/reranker-demo/reranker-demo.py --model_path=tiny-encoder --output_dir=reranker-out \
        --dataset_path=app/presets/embedding-demo/embedding-demo.jsonl --finetuning_type=full \
        --max_steps=150 --batch_size=16 --learning_rate=0.002

A row is a query and a document that answers it (`query` and `positive`, `anchor` and `positive`, `query` and
`document`, ..., or the columns named by `input_train_name` and `output_train_name`), optionally with a `negative` or
several `negatives`; or `query`, `document` and `label`, the more the better. Where a query has fewer than
`num_negatives` wrong documents, those of other queries are taken: by chance, or, with `hard_negatives_model_path`,
those that an embedding model finds nearest. A document that some row names as right for a query is never a wrong one.

The score is ranking for queries that are held out, before, during and after: `mrr@10`, `ndcg@10`, `accuracy@1`.
Held-out file, checkpoints and SIGTERM as in sft-demo.py: `output_dir` holds the adapter, or the whole model.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
import deepe_loading as loading
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter
from deepe_examples import load_examples
from deepe_log import log, remark
from deepe_options import Options, options_of
from deepe_reranking import AT_ONCE, Group, Right, drawn, groups_of, measures, right_documents, shown
from deepe_rows import GRADED, PAIR, Refused, Wanted
from deepe_scores import SAMPLES, evaluation_settings, report_score, score_loss
from deepe_steps import of_whole_steps
from deepe_whole import HEADS, check_whole, freeze, trains_whole

LIBRARY_OPTIONS = {  # every field of these classes can be set, beside the arguments below
    "classes": {
        "sentence_transformers.cross_encoder.CrossEncoderTrainingArguments": {},
        **CLASSES,
    },
}
LEARNS = Wanted(kinds=frozenset({PAIR, GRADED}))
TUPLES = "multiple_negatives_ranking"
SINGLE = "binary_cross_entropy"
LOSSES = {
    SINGLE: "BinaryCrossEntropyLoss",
    TUPLES: "MultipleNegativesRankingLoss",
    "lambda": "LambdaLoss",
    "list_net": "ListNetLoss",
    "rank_net": "RankNetLoss",
}
OF_COMPARED = ("lambda", "rank_net")  # means over all comparisons of two documents, not over queries


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a reranker.", allow_abbrev=False)
    arguments.add_job(parser, model_name="reranker-demo")
    data = arguments.add_rows(parser, columns=("the query", "its document"))
    data.add_argument("--max_seq_length", type=int, default=512, help="tokens of query and document; the rest is cut")
    method = parser.add_argument_group("method")
    method.add_argument(
        "--loss",
        choices=["binary_cross_entropy", "multiple_negatives_ranking", "lambda", "list_net", "rank_net"],
        default="binary_cross_entropy",
        help="what is learned of a query's documents",
    )
    method.add_argument("--num_negatives", type=int, default=4, help="wrong documents that each query has at least")
    method.add_argument(
        "--hard_negatives_model_path", default=None, help="folder of an embedding model that finds wrong documents"
    )
    method.add_argument(
        "--hard_negatives_skip", type=int, default=0, help="nearest documents that are passed over: they may be right"
    )
    arguments.add_steps(parser, learning_rate=2e-4, warmup_ratio=0.1, rows="queries, or pairs with a single loss")
    machine = parser.add_argument_group("adapter, memory and speed")
    arguments.add_finetuning_type(machine)
    arguments.add_adapter(machine)
    machine.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="numbers of a step")
    machine.add_argument(
        "--gradient_checkpointing", choices=["auto", "true", "false"], default="auto", help="recompute activations"
    )
    watch = arguments.add_watch(parser)
    arguments.add_held_out(watch, answers=False)
    watch.add_argument("--eval_documents", type=int, default=50, help="documents that are ordered for a held-out query")
    parser.set_defaults(load_in_4bit=False, attention="auto")
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    log("HandleWithDataset", args.dataset_path, args)
    parts = load_examples(args, LEARNS)
    learned, held_out = groups_of(parts.train), groups_of(parts.held_out)
    right = right_documents([*learned, *held_out])
    documents = sorted({text for group in [*learned, *held_out] for text in group.documents})
    asked = [candidates(group, documents, right, args) for group in unique(held_out)]
    learned, held_out = with_negatives(learned, held_out, documents, right, args)

    log("InitializingModel", args.model_path, args)
    machine = replace(llm.choose(args), attention=None)  # what suits the architecture
    checkpointing = plan_memory(args, machine, learned)
    trainer = build_trainer(args, machine, learned, held_out, asked, checkpointing=checkpointing)
    tell_cut_texts(trainer.model, learned, args)
    score(trainer, asked, args, "before")
    llm.train(trainer, len(parts.train), args)
    llm.save_adapter(trainer, args)
    score(trainer, asked, args, "after")
    shutil.rmtree(Path(args.output_dir) / "eval", ignore_errors=True)  # an empty folder of the library
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    check_whole(args, learning_rate=2e-5)
    check_adapter(args, lacks=("prompts", "ranks"))
    llm.check(args)
    for name, least in {"num_negatives": 1, "hard_negatives_skip": 0, "eval_documents": 2, "max_seq_length": 8}.items():
        if getattr(args, name) < least:
            raise Refused(f"{name} must be at least {least}, it is {getattr(args, name)}")
    if args.hard_negatives_skip and not args.hard_negatives_model_path:
        raise Refused("hard_negatives_skip has no effect without hard_negatives_model_path; leave it out")
    finder = Path(args.hard_negatives_model_path or args.model_path)
    if not any((finder / name).is_file() for name in ("config.json", "modules.json")):
        raise Refused(f"hard_negatives_model_path: there is no embedding model in {finder}")
    kind = str((read_json(Path(args.model_path) / "config.json").get("architectures") or [""])[0])
    if kind.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise Refused(
            f"the base model in {args.model_path} is a {kind}, which writes texts; Reranker-Demo trains encoders such "
            "as BERT, ModernBERT or XLM-R, and rerankers made of them"
        )


def read_json(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- rows -----------------------------------------------------------------------------------------------------------


def unique(groups: Iterable[Group]) -> list[Group]:
    """Return one group for each query."""
    return list({group.query: group for group in reversed(list(groups))}.values())[::-1]


def candidates(group: Group, documents: Sequence[str], right: Right, args: argparse.Namespace) -> Group:
    """Return what is ordered for a held-out query: its own documents, all right ones, and others of the data set."""
    answers = [text for text in right[group.query] if text not in group.documents]
    whole = Group(group.query, (*group.documents, *sorted(answers)), (*group.grades, *[1.0] * len(answers)))
    count = args.eval_documents - len(whole.documents)
    return whole.with_negatives(drawn(whole, documents, right, count, args.seed)) if count > 0 else whole


def with_negatives(
    learned: list[Group], held_out: list[Group], documents: Sequence[str], right: Right, args: argparse.Namespace
) -> tuple[list[Group], list[Group]]:
    """Return the groups that can be learned from, each with wrong documents, and tell where those come from."""
    whole = [*learned, *held_out]
    top = max((grade for group in whole for grade in group.grades), default=0)
    if args.loss == SINGLE and top > 1:
        raise Refused(
            f"loss={SINGLE} needs labels from 0 to 1, the highest is {top:g}; choose loss=lambda, which learns an order"
        )
    count = args.num_negatives
    if args.loss == TUPLES:  # every row has as many
        count = max(count, max(len(group.negatives) for group in whole))
    lacking = dict.fromkeys(group for group in whole if lacks(group, args))
    mined = mine(lacking, documents, right, count, args) if args.hard_negatives_model_path else {}
    filled, nearest, by_chance = [], 0, 0
    for group in whole:
        if group in lacking:
            missing = count - len(group.negatives)
            found = mined.get(group, [])[:missing]
            group = group.with_negatives(found)
            chance = drawn(group, documents, right, missing - len(found), args.seed) if missing > len(found) else []
            nearest, by_chance = nearest + len(found), by_chance + len(chance)
            group = group.with_negatives(chance)
        if args.loss == TUPLES and len(group.negatives) < count:
            raise Refused(
                f"loss={TUPLES} needs {count} wrong documents for each query, there are {len(group.negatives)} for "
                f"'{group.query[:60]}'; lower num_negatives, or choose another loss"
            )
        filled.append(group)
    if lacking:
        told = f"{sum(group in lacking for group in whole)} of {len(whole)} queries have fewer than {count} wrong "
        told += "documents of their own: "
        how = f"{nearest} are the nearest by the embedding model, " if mined else ""
        remark(f"{told}{how}{by_chance} are taken from other queries by chance", args, warning=False)
    kept = [group for group in filled[: len(learned)] if teaches(group, args)]
    measured = [group for group in filled[len(learned) :] if teaches(group, args)]
    if gone := len(whole) - len(kept) - len(measured):
        remark(f"{gone} of {len(whole)} queries are left out: all their documents have the same label", args)
    if len({grade for group in kept for grade in group.grades}) < 2:
        raise Refused("there is nothing to tell apart: no query has a right and a wrong document")
    return kept, measured


def lacks(group: Group, args: argparse.Namespace) -> bool:
    """Say whether wrong documents are looked for: where a query has none graded, or each needs as many."""
    if len(group.negatives) >= args.num_negatives and args.loss != TUPLES:
        return False
    return args.loss == TUPLES or not group.teaches or group.grades.count(0.0) == len(group.grades) - 1


def teaches(group: Group, args: argparse.Namespace) -> bool:
    return args.loss == SINGLE or group.teaches


def mine(
    groups: Collection[Group], documents: Sequence[str], right: Right, count: int, args: argparse.Namespace
) -> dict[Group, list[str]]:
    """Return the wrong documents that an embedding model finds nearest to each query."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    pairs = [(group.query, text) for group in groups for text in sorted(right[group.query])]
    if not pairs:
        return {}
    loading.weights(args.hard_negatives_model_path)
    with quiet():
        finder = SentenceTransformer(args.hard_negatives_model_path, device=llm.own_device(), local_files_only=True)
        found = mine_hard_negatives(
            Dataset.from_dict({"query": [query for query, _ in pairs], "positive": [text for _, text in pairs]}),
            finder,
            anchor_column_name="query",
            positive_column_name="positive",
            corpus=list(documents),
            range_min=args.hard_negatives_skip,
            range_max=args.hard_negatives_skip + 4 * count + max(map(len, right.values())),
            num_negatives=count,
            output_format="triplet",
            verbose=False,
        )
    near: dict[str, dict[str, None]] = {}
    for row in found:
        if row["negative"] not in right[row["query"]]:
            near.setdefault(row["query"], {})[row["negative"]] = None
    return {group: [text for text in near.get(group.query, ()) if text not in group.documents] for group in groups}


def rows_of(groups: Iterable[Group], loss: str) -> list[dict[str, Any]]:
    """Return groups as the loss takes them."""
    if loss == SINGLE:
        return [
            {"query": group.query, "document": text, "label": grade}
            for group in groups
            for text, grade in zip(group.documents, group.grades, strict=True)
        ]
    if loss == TUPLES:
        return [
            {"query": group.query, "positive": text}
            | {f"negative_{number}": wrong for number, wrong in enumerate(group.negatives, start=1)}
            for group in groups
            for text, grade in zip(group.documents, group.grades, strict=True)
            if grade > 0
        ]
    return [{"query": one.query, "documents": list(one.documents), "label": list(one.grades)} for one in groups]


# --- training -------------------------------------------------------------------------------------------------------


def plan_memory(args: argparse.Namespace, machine: llm.Machine, groups: Sequence[Group]) -> bool:
    """Return whether to recompute activations; tell what memory is expected, refuse what cannot fit."""
    most = max(len(f"{group.query}{text}".encode()) for group in groups for text in group.documents)
    return llm.plan_memory(args, machine, min(most + 8, args.max_seq_length), method="reranking")


def build_trainer(
    args: argparse.Namespace,
    machine: llm.Machine,
    learned: Sequence[Group],
    held_out: Sequence[Group],
    asked: Sequence[Group],
    *,
    checkpointing: bool,
) -> Any:
    from datasets import Dataset
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    class Ranked(of_whole_steps(CrossEncoderTrainer)):  # type: ignore[misc]
        """Counts what the loss is a mean of by all of the step."""

        def sizes_of(self, batch: dict[str, Any]) -> tuple[int, int]:
            return weight_of(batch, args.loss), 1

        def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> Any:
            # The library lets the first processes make one step more than the last ones, which then wait for no one.
            self.accelerator.even_batches = True
            return super()._build_dataloader(dataset, batch_size, dataset_kind)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *more: Any, **named: Any) -> Any:
            share = self.next_share().rows
            loss, outputs = super().compute_loss(model, inputs, True, *more, **named)
            return (loss * share, outputs) if return_outputs else loss * share

    class Measures(BaseEvaluator):  # type: ignore[misc]
        """Orders the documents of held-out queries, and keeps what was found."""

        last: dict[str, float]

        def __call__(self, model: Any, *_args: Any, **_named: Any) -> dict[str, float]:
            self.last = measures(asked, scores_of(model, asked))
            return dict(self.last)

    model = load(args, machine)
    settings = llm.trainer_settings(args, machine, checkpointing=checkpointing) | evaluation_settings(args, held_out)
    settings["ddp_find_unused_parameters"] = False  # torch does not find the score in what the model returns
    config = options_of(args).build(CrossEncoderTrainingArguments, **settings)
    if "dataloader_drop_last" not in options_of(args).given:  # the library sets it for several processes
        config.dataloader_drop_last = False
    given, measured = (Dataset.from_list(rows_of(some, args.loss)) if some else None for some in (learned, held_out))
    with options_of(args).refusing():
        return Ranked(
            model=model,
            args=config,
            train_dataset=given,
            eval_dataset=measured,
            loss=loss_of(args.loss, model),
            evaluator=Measures() if measured else None,
            callbacks=llm.callbacks(args),
        )


def weight_of(batch: dict[str, Any], loss: str) -> int:
    """Return how much of a batch the loss is a mean of: queries, pairs, or documents of which one is better."""
    if loss not in OF_COMPARED:
        return len(batch["query"])
    better = [(grades[:, None] > grades[None, :]).sum().item() for grades in batch["label"]]
    return int(sum(better))


def load(args: argparse.Namespace, machine: llm.Machine) -> Any:
    """Return the base model as a cross-encoder, with an adapter if one is trained; a new head hangs on the seed."""
    import torch
    from sentence_transformers.cross_encoder import CrossEncoder
    from transformers import set_seed

    set_seed(args.seed)
    safe = loading.weights(args.model_path)
    with quiet():
        model = CrossEncoder(
            args.model_path,
            num_labels=1,
            device=llm.own_device(),
            local_files_only=True,
            trust_remote_code=safe.pop("trust_remote_code", False),
            model_kwargs={"dtype": torch.float32, **safe},
        )
    model.max_seq_length = min(args.max_seq_length, model.max_seq_length)  # what the model can read
    if trains_whole(args):
        freeze(model.model, args)
        return model
    adapter = adapter_config(args, model.model, llm.linear_layers(model.model), task="SEQ_CLS")
    adapter.modules_to_save = sorted({*(adapter.modules_to_save or ()), *(h for h in HEADS if hasattr(model.model, h))})
    adapter.base_model_name_or_path = args.model_path
    with options_of(args).refusing():
        model.add_adapter(adapter)
    return model


def loss_of(name: str, model: Any) -> Any:
    from sentence_transformers.cross_encoder import losses

    if name == SINGLE:
        return losses.BinaryCrossEntropyLoss(model)
    if name != TUPLES:  # what a step keeps is the same in one pass or in several
        return getattr(losses, LOSSES[name])(model, mini_batch_size=-1)

    class OwnNegatives(losses.MultipleNegativesRankingLoss):
        """Compares with the query's own wrong documents: one of another row may be right for it."""

        def get_in_batch_negatives(self, *_: Any) -> Iterable[list[str]]:
            return ()

    return OwnNegatives(model)


def tell_cut_texts(model: Any, groups: Sequence[Group], args: argparse.Namespace) -> None:
    """Tell how many documents are longer, with their query, than what is read of them."""
    pairs = {(group.query, text) for group in groups for text in group.documents}
    longest = model.max_seq_length
    long = [pair for pair in pairs if len("".join(pair).encode()) + 8 > longest]  # no token has less than a byte
    cut = sum(len(model.tokenizer(*pair)["input_ids"]) > longest for pair in long)
    if cut:
        remark(
            f"{cut} of {len(pairs)} documents have, with their query, more than {longest} tokens; the rest of them "
            "is not read",
            args,
        )


@contextlib.contextmanager
def quiet() -> Any:
    """Leave out what libraries say while a model is loaded: a new head is no news."""
    from transformers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)


# --- score ----------------------------------------------------------------------------------------------------------


def scores_of(model: Any, groups: Sequence[Group]) -> list[list[float]]:
    """Return the scores of each group's documents, as the model gives them."""
    from torch.nn import Identity

    pairs = [(group.query, text) for group in groups for text in group.documents]
    scores = model.predict(pairs, batch_size=AT_ONCE, show_progress_bar=False, activation_fn=Identity())
    found = iter(scores.tolist())
    return [[next(found) for _ in group.documents] for group in groups]


def score(trainer: Any, asked: Sequence[Group], args: argparse.Namespace, phase: str) -> None:
    """Report the held-out loss, and how well the documents of held-out queries are ordered."""
    score_loss(trainer, phase)
    if trainer.evaluator is not None and trainer.is_world_process_zero():
        for name, value in trainer.evaluator.last.items():
            report_score(name, phase, value, len(asked))
        some = list(asked[:SAMPLES])
        for number, (group, scores) in enumerate(zip(some, scores_of(trainer.model, some), strict=True)):
            ranked = sorted(zip(scores, group.documents, strict=True), key=lambda one: -one[0])[:3]
            best = group.documents[group.grades.index(max(group.grades))]
            deepe.sample(phase, number, group.query, best, "\n".join(f"{shown(one)}  {text}" for one, text in ranked))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
