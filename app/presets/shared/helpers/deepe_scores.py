"""Scores of language models on held-out rows, before and after a training.

torch is imported inside functions, so that a script's `--help` and its refusals come at once.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import deepe
from deepe_best import check_rows, check_steps, tell_best, tell_ended, tell_no_best
from deepe_chat import after_reasoning, is_cut_in_reasoning
from deepe_distributed import answers_here, is_divided, measure, without_gradients
from deepe_log import remark
from deepe_rewards import Judge
from deepe_rewards import columns_of as columns_of_tasks
from deepe_rows import Question, Rendered, written

SCORED_AT_ONCE = 32
IGNORED = -100  # label of a token that is not learned
SAMPLES = 5  # answers that are kept with the job
SHORT_ANSWER = 64  # tokens; longer answers are hardly ever the same to the letter


def report_score(name: str, phase: str, value: float, samples: int) -> None:
    """Report a number on held-out rows to the platform and to people."""
    if deepe.is_first():
        deepe.evaluation(phase, value, samples, name=name)
        print(f"{name.replace('_', ' ')} on {samples} held-out rows {phase} training: {value:.3f}", flush=True)


# --- held-out loss --------------------------------------------------------------------------------------------------


def evaluation_settings(args: argparse.Namespace, held_out: Sequence[Any]) -> dict[str, Any]:
    """Return the settings of a trainer that measures on held-out rows while it trains, and may end early by that."""
    settings = {
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": args.eval_steps,
        "per_device_eval_batch_size": args.batch_size,
    }
    if args.early_stopping_patience is None:
        return settings
    check_rows(held_out, "early_stopping_patience")
    check_steps(args, "early_stopping_patience")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    return settings | best | {"restore_callback_states_from_checkpoint": True}


def by_length(sequences: Sequence[Rendered]) -> list[Rendered]:
    """Return sequences so that batches of them are padded little."""
    return sorted(sequences, key=lambda one: len(one.tokens))


def early_stopping(args: argparse.Namespace) -> list[Any]:
    """Return what ends a training early, if that is asked for."""
    if getattr(args, "early_stopping_patience", None) is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)]


def tell_kept(trainer: Any, args: argparse.Namespace) -> None:
    """Tell whether a training has ended early, and which step's weights it has in the end."""
    state, config = trainer.state, trainer.args
    if state.global_step < state.max_steps:
        tell_ended(state.global_step, state.max_steps, config.metric_for_best_model, args)
    if not config.load_best_model_at_end:
        return
    if state.best_model_checkpoint is None:
        tell_no_best(state.global_step, args)
    else:
        curve = f"eval_{config.metric_for_best_model.removeprefix('eval_')}"
        tell_best(state.best_global_step, curve, state.best_metric, args)


def score_loss(trainer: Any, phase: str) -> None:
    """Report the trainer's loss on its held-out rows, and the perplexity where the loss is one of tokens."""
    if trainer.eval_dataset is None:
        return
    import torch

    with torch.random.fork_rng():  # the training draws the same random numbers as without a score
        dataloader = trainer.get_eval_dataloader()
        found = trainer.evaluation_loop(dataloader, "Evaluation", prediction_loss_only=True).metrics
    getattr(trainer, "_metrics", {}).get("eval", {}).clear()  # TRL's, else they are part of the next point
    curves = {name: found[name] for name in ("eval_loss", "eval_perplexity") if name in found}
    report_loss(found["eval_loss"], phase, len(trainer.eval_dataset), of_tokens="eval_perplexity" in found)
    if phase == "before":
        begin_curves(trainer, curves)
    vars(trainer).pop("model_preparation_time", None)  # would be a curve of its own


def begin_curves(trainer: Any, curves: dict[str, float]) -> None:
    """Have what was measured before a training as the first points of its curves.

    Not if the training goes on: a point at step 0 says that all later ones are void.
    """
    from transformers import TrainerCallback

    class Beginning(TrainerCallback):
        def on_train_begin(self, config: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                trainer.callback_handler.on_log(config, state, control, curves)

    trainer.add_callback(Beginning())


def report_loss(loss: float, phase: str, samples: int, *, of_tokens: bool = True) -> None:
    """Report a loss on held-out rows, with its perplexity if it is the mean over tokens."""
    report_score("eval_loss", phase, loss, samples)
    if of_tokens:
        report_score("perplexity", phase, perplexity(loss), samples)


def over_tokens(trainer_class: Any) -> Any:
    """Return an SFTTrainer whose held-out loss is the mean over all learned tokens, as the loss of a step is.

    Its own is a mean over batches, which depends on the rows that lie together.
    """
    import torch

    class OverTokens(trainer_class):  # type: ignore[misc, unused-ignore]
        _sums = (0.0, 0.0)

        def __init__(self, *args: Any, model: Any, **more: Any) -> None:
            own = getattr(model.config, "router_aux_loss_coef", None)
            super().__init__(*args, model=model, **more)
            if own is not None:  # the trainer asks for it at each loss; answers and saved models shall not
                model.config.output_router_logits = False
                if not self.aux_loss_enabled:
                    model.config.router_aux_loss_coef = own

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **more: Any) -> Any:
            self._sums = (0.0, 0.0)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **more)
            sums = torch.tensor(self._sums, dtype=torch.float64)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums.to(self.accelerator.device))
            loss = (sums[0] / sums[1].clamp(min=1)).item()
            output.metrics[f"{metric_key_prefix}_loss"] = loss
            if self.args.loss_type == "nll" and not (self.aux_loss_enabled or self.args.label_smoothing_factor):
                output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(loss)
            return output

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
            inputs["labels"] = self._without_repeated(inputs)
            found = super().prediction_step(model, inputs, *args, **more)
            tokens = (inputs["labels"][..., 1:] != IGNORED).sum().item()
            self._sums = (self._sums[0] + found[0].item() * tokens, self._sums[1] + tokens)
            return found

        def _without_repeated(self, inputs: Any) -> Any:
            """Return the labels, none for rows that come again to fill up the last batches of several processes."""
            labels, state = inputs["labels"], self.accelerator.gradient_state
            if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
                return labels
            rows = torch.arange(len(labels), device=labels.device)[:, None]
            if "attention_mask" not in inputs:  # rows lie behind each other
                rows = (inputs["position_ids"] == 0).cumsum(-1) - 1
            own = state.remainder - self.accelerator.process_index * self.args.per_device_eval_batch_size
            return labels.masked_fill(rows >= own, IGNORED)

    return OverTokens


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss of tokens; what is too large for a number is infinite."""
    return math.exp(loss) if loss < 700 else math.inf


# --- answers --------------------------------------------------------------------------------------------------------


def score(trainer: Any, tokenizer: Any, asked: Sequence[Rendered], args: argparse.Namespace, phase: str) -> None:
    """Report the held-out loss, and how many prompts get exactly the wanted answer."""

    def work() -> None:
        score_loss(trainer, phase)
        if asked and answers_here(trainer):
            report_exact_match(trainer.model, tokenizer, asked, args, phase)

    measure(trainer, phase, work, args)


def report_exact_match(
    model: Any, tokenizer: Any, asked: Sequence[Rendered], args: argparse.Namespace, phase: str
) -> None:
    """Report how many prompts the model answers with exactly the wanted text, by its most likely answers."""
    prompts = [prompt_of(one, tokenizer) for one in to_answer(asked, tokenizer, args)]
    given = greedy_answers(model, tokenizer, prompts, args.eval_max_new_tokens)
    report_right(prompts, given, asked, tokenizer, args, phase)


def to_answer(asked: Sequence[Rendered], tokenizer: Any, args: argparse.Namespace) -> Sequence[Rendered]:
    """Return the rows that are answered: all for an exact match, a few where answers are too long for one."""
    return asked if are_short(asked, tokenizer, args) else asked[:SAMPLES]


def are_short(asked: Sequence[Rendered], tokenizer: Any, args: argparse.Namespace) -> bool:
    """Whether most wanted answers can be given in full, and are short enough to be the same to the letter."""
    lengths = [len(tokenizer.encode(wanted_of(one, tokenizer), add_special_tokens=False)) for one in asked]
    whole = [len(one.tokens) - one.start <= args.eval_max_new_tokens for one in asked]
    return median(lengths) <= SHORT_ANSWER and 2 * sum(whole) >= len(whole)


def report_samples(turns: Sequence[Sequence[Any]], wanted: Sequence[str], given: Sequence[str], phase: str) -> None:
    """Report the first answers as they were given; of a conversation, its last turn stands for the prompt."""
    for number, (prompt, right, text) in enumerate(list(zip(turns, wanted, given, strict=False))[:SAMPLES]):
        deepe.sample(phase, number, text_of(prompt[-1]), right, text)


def text_of(turn: Any) -> str:
    """Return the text of a turn, whose content may be a list of parts."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def report_right(
    prompts: Sequence[str],
    given: Sequence[str],
    asked: Sequence[Rendered],
    tokenizer: Any,
    args: argparse.Namespace,
    phase: str,
) -> None:
    """Report the share of given answers that are exactly what a training would learn, reasoning left aside.

    `prompts` and `given` are those of the rows that `to_answer` names; some of them are kept.
    """
    wanted = [wanted_of(one, tokenizer) for one in asked[: len(given)]]
    report_samples([one.example.prompt for one in asked], wanted, given, phase)
    if not are_short(asked, tokenizer, args):
        if phase == "before":
            remark(
                f"no exact match is measured: most wanted answers are longer than {SHORT_ANSWER} tokens or than "
                f"eval_max_new_tokens ({args.eval_max_new_tokens}); eval_loss says how likely they are",
                args,
                warning=False,
            )
        return
    right = sum(
        not is_cut_in_reasoning(prompt, text) and after_reasoning(text) == answer
        for prompt, text, answer in zip(prompts, given, wanted, strict=True)
    )
    report_score("exact_match", phase, right / len(asked), len(asked))
    remark_cut_reasoning(prompts, given, "eval_max_new_tokens", args)


def remark_cut_reasoning(prompts: Sequence[str], given: Sequence[str], limit: str, args: argparse.Namespace) -> None:
    """Tell how many answers the limit of tokens has ended before they were given."""
    cut = sum(map(is_cut_in_reasoning, prompts, given))
    if cut:
        remark(
            f"{cut} of {len(given)} scored answers are still reasoning after {getattr(args, limit)} tokens and count "
            f"as wrong; raise {limit}",
            args,
        )


def prompt_of(one: Rendered, tokenizer: Any) -> str:
    """Return the text that is asked."""
    return written(one.example.prompt, one.example.tools, tokenizer, add_generation_prompt=True)


def wanted_of(one: Rendered, tokenizer: Any) -> str:
    """Return the text of what is learned of an answer, without its reasoning and the tokens that end it."""
    return after_reasoning(tokenizer.decode(one.tokens[one.start :], skip_special_tokens=True))


def score_rewards(
    model: Any, tokenizer: Any, tasks: list[Question], judge: Judge, args: argparse.Namespace, phase: str | None
) -> dict[str, float]:
    """Return the mean reward of held-out questions, and the share of right answers to those whose result is known.

    They are named as points of curves. With a phase they are reported as scores, too.
    """
    prompts = [task.prompt for task in tasks]
    texts = [written(task.prompt, task.tools, tokenizer, add_generation_prompt=True) for task in tasks]
    given = greedy_answers(model, tokenizer, texts, args.max_content_length)
    columns = columns_of_tasks(tasks)
    said = ["" if is_cut_in_reasoning(*one) else after_reasoning(one[1]) for one in zip(texts, given, strict=True)]
    known = [one for one in zip(said, columns["answer"], strict=True) if one[1]]
    found = {"exact_match": (judge.right(*zip(*known, strict=True)), len(known))} if known else {}
    found["reward"] = (sum(judge.totals(given, prompts, columns)) / len(tasks), len(tasks))
    if phase is not None:
        report_samples(prompts, [task.reference or "" for task in tasks], given, phase)
        for name, (value, samples) in found.items():
            report_score(name, phase, value, samples)
        remark_cut_reasoning(texts, given, "max_content_length", args)
    return {f"eval_{name}": value for name, (value, _samples) in found.items()}


def measure_meanwhile(trainer: Any, steps: int, score: Callable[[], dict[str, float]]) -> None:
    """Have every so many steps of a training what `score` returns as points of its curves.

    Each process calls it and waits for the others. A stop that is asked for meanwhile leaves the point out.
    """
    from transformers import TrainerCallback

    class Meanwhile(TrainerCallback):
        def on_step_end(self, config: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps:
                return
            with contextlib.suppress(Stopped):
                if curves := score():
                    trainer.callback_handler.on_log(config, state, control, curves)
            trainer.accelerator.wait_for_everyone()

    # the first: a point takes back that the step is to be logged, and others look for a stop afterwards
    trainer.callback_handler.callbacks.insert(0, Meanwhile())


class Stopped(SystemExit):
    """Answers were given up because the run is to stop."""


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    max_new_tokens: int,
    encode: Callable[[Any, list[Any]], Any] | None = None,
    *,
    at_once: int = SCORED_AT_ONCE,
) -> list[str]:
    """Return the model's most likely answer to each prompt, a text as it is asked, or what `encode` makes tokens of.

    Raises `Stopped`, which ends the process, when the run is asked to stop.
    """
    encode = encode or encode_prompts
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    training = model.training
    model.eval()
    found: list[str] = []
    try:
        with without_gradients():
            for start in range(0, len(prompts), at_once):
                encoded = encode(tokenizer, prompts[start : start + at_once]).to(model.device)
                output = model.generate(
                    **encoded,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                )
                found += tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
                if deepe.stop_requested() and not is_divided():  # with parts of a model the others would wait for ever
                    raise Stopped(deepe.STOPPED)
    finally:
        tokenizer.padding_side = side
        model.train(training)
    return found


def encode_prompts(tokenizer: Any, prompts: list[str]) -> Any:
    """Return the tokens of texts that a chat template has written, padded on the tokenizer's side."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    encoded.pop("token_type_ids", None)
    return encoded
