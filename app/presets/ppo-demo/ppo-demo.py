r"""PPO-Demo, training: proximal policy optimization with LoRA, as one loop that can be read.

In each step the model answers some questions. Each answer is judged, a value head estimates along the way what the
judgement will be, and what turned out better than estimated becomes more likely: never by more than `clip` at once, and
at a price for every token that the base model would not have said (`kl_coef`). Judges are

- `reward=rule`: the right result, its form, brevity, or functions of a file of yours, as in GRPO-Demo;
- `reward=model`: a reward model, from `reward_model_path` (such as one of Reward-Demo), or made first from the pairs in
  `preference_path` (`prompt`, `chosen`, `rejected`) and kept in `<output_dir>/reward-model`. Models find what fools
  their judge: watch `kl` and `exact_match`, which the reward model has no part in.

Try it by hand, in a checkout of the product, with the interpreter of the `trl` environment (about half a minute):

    python app/presets/shared/tiny_base.py --output tiny-styles --answers=styles --steps=600
    python app/presets/ppo-demo/ppo-demo.py --model_path=tiny-styles \
        --dataset_path=app/presets/grpo-demo/grpo-demo.jsonl \
        --output_dir=ppo-out --system_prompt= --max_steps=30 --rollouts=64 --batch_size=32 --learning_rate=0.001 \
        --max_content_length=24

Rows, held-out file, checkpoints and SIGTERM as in grpo-demo.py. It trains in one process on one GPU.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
import deepe_arguments as arguments
import deepe_llm as llm
from deepe_adapter_kinds import CLASSES, adapter_config, check_adapter, hold_rows
from deepe_adapters import ADAPTER, REFERENCE, adopt_kind, as_reference, check_start, load_start, start_of
from deepe_checkpoints import make_readable, newest_checkpoint
from deepe_log import log, remark, remark_plan
from deepe_options import Options, options_of
from deepe_preparation import Preparation
from deepe_reward_model import check_reward_model, load_reward_model, make_reward_model
from deepe_rewards import Judge, columns_of, judge_of
from deepe_rows import QUESTION, Question, Refused, Wanted, written
from deepe_scores import Stopped, encode_prompts, score_rewards
from deepe_tokens import check_tokens
from deepe_trackers import follow

STATE = "ppo.pt"
LAMBDA = 0.95  # how far advantages look ahead
VALUE_WEIGHT = 0.1


LIBRARY_OPTIONS = {"classes": {**CLASSES}}  # every field of it can be set, beside the arguments below
LEARNS = Wanted(kinds=frozenset({QUESTION}), tools=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Proximal policy optimization.", allow_abbrev=False)
    arguments.add_job(parser, model_name="ppo-demo", goes_on=True)

    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--reward",
        choices=["auto", "rule", "model"],
        default="auto",
        help="who judges; auto: the model, if one is named",
    )
    arguments.add_rule_reward(reward)
    reward.add_argument("--reward_model_path", default=None, help="folder of a reward model")
    reward.add_argument("--preference_path", default=None, help="JSONL file with pairs to make a reward model from")
    reward.add_argument("--reward_steps", type=int, default=200, help="steps of making the reward model")
    reward.add_argument("--reward_learning_rate", type=float, default=1e-5, help="learning rate of the reward model")

    data = arguments.add_rows(parser, columns=("the question", "the result"))
    arguments.add_system_prompt(data)
    arguments.add_lengths(data, of_input="a question", of_output="an answer", output_tokens=256)
    arguments.add_template(data)
    arguments.add_tokens(data)
    arguments.add_workers(data)

    method = parser.add_argument_group("method")
    method.add_argument("--rollouts", type=int, default=64, help="answers in one step")
    method.add_argument("--ppo_epochs", type=int, default=2, help="passes over the answers of a step")
    method.add_argument("--kl_coef", type=float, default=0.02, help="price of leaving the base model, by token")
    method.add_argument("--clip", type=float, default=0.2, help="largest change of a token's probability in a step")
    method.add_argument("--value_learning_rate", type=float, default=2e-3, help="learning rate of the value head")
    method.add_argument("--temperature", type=float, default=1.0, help="how different the answers are")

    steps = parser.add_argument_group("training")
    steps.add_argument("--epochs", type=float, default=1.0, help="passes over the rows, unless max_steps is given")
    steps.add_argument("--max_steps", type=int, default=None, help="number of steps, instead of epochs")
    steps.add_argument("--batch_size", type=int, default=8, help="answers in one forward pass")
    steps.add_argument("--grad_accum_steps", type=int, default=1, help="forward passes between two changes of weights")
    steps.add_argument("--learning_rate", type=float, default=1e-5, help="learning rate of the adapter")
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are cut to this length")
    steps.add_argument(
        "--optimizer", choices=["adamw_torch_fused", "adamw_torch"], default="adamw_torch_fused", help="both are AdamW"
    )
    arguments.add_seed(steps)

    machine = parser.add_argument_group("adapter, memory and speed")
    arguments.add_adapter(machine)
    arguments.add_memory(machine, dtypes=["auto", "bfloat16", "float32"])
    watch = arguments.add_watch(parser, logging_steps=1, save_steps=50)
    watch.add_argument("--eval_steps", type=int, default=50, help="steps between two points of the held-out reward")
    return parser


def main() -> None:
    args, rest = make_parser().parse_known_args()
    adopt_kind(args)
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    llm.run_stage(args, run)


def run(args: argparse.Namespace) -> None:
    check(args)
    judge = judge_of(args)
    log("HandleWithDataset", args.dataset_path, args)
    preparation = Preparation(args, LEARNS, judge.check)

    log("InitializingModel", args.model_path, args)
    machine = llm.choose(args)
    if machine.dtype == "float16":  # its small numbers would need a scaled loss
        machine = replace(machine, dtype="float32")
    tokenizer = llm.load_tokenizer(args.model_path, args)
    tokenizer.padding_side = "left"
    tasks, held_out = preparation.sequences(tokenizer, judge.recipe(args.system_prompt))
    judge = with_model(args, judge, machine, tokenizer)
    remark(judge.told(), args, warning=False)
    learner = Learner(args, machine, tokenizer, judge, tasks.longest + args.max_content_length)

    def score(phase: str | None = None) -> dict[str, float]:
        return score_rewards(learner.policy, tokenizer, held_out, judge, args, phase) if held_out else {}

    before = score("before")
    with follow(args, learner.policy):
        train(learner, tasks.rows(), preparation.rows, before, score)
    log("SaveTrainedModel", args.model_name, args)
    learner.policy.save_pretrained(args.output_dir, selected_adapters=[ADAPTER])
    tokenizer.save_pretrained(args.output_dir)
    llm.write_ends(learner.policy, args)
    llm.announce_adapter(args)
    score("after")
    log("TrainingSuccess", args.model_name, args)


def check(args: argparse.Namespace) -> None:
    check_adapter(args, lacks=("prompts", "ranks", "base"))
    llm.check(args)
    check_start(args, compares=True)
    check_tokens(args)
    for name in ("rollouts", "ppo_epochs", "reward_steps"):
        if getattr(args, name) < 1:
            raise Refused(f"{name} must be at least 1, it is {getattr(args, name)}")
    for name in ("temperature", "clip"):
        if getattr(args, name) <= 0:
            raise Refused(f"{name} must be above 0, it is {getattr(args, name)}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise Refused("PPO-Demo trains in one process: start it without torchrun or accelerate, with one GPU")
    named = [name for name in ("reward_model_path", "preference_path") if getattr(args, name)]
    if args.reward == "auto":
        args.reward = "model" if named else "rule"
    if args.reward == "rule" and named:
        raise Refused(f"{named[0]} has no effect with reward=rule; leave it out, or set reward=model")
    if args.reward == "model" and not named:
        raise Refused("reward=model needs a reward_model_path, or a preference_path with pairs to make one from")
    if len(named) > 1:
        raise Refused("reward_model_path and preference_path both say who judges; leave one out")
    if args.reward_model_path:
        check_reward_model(Path(args.reward_model_path))


def with_model(args: argparse.Namespace, judge: Judge, machine: llm.Machine, tokenizer: Any) -> Judge:
    """Return who judges the answers: the rules, or a reward model, which may have to be made first."""
    if args.reward == "rule":
        return judge
    folder = Path(args.reward_model_path or Path(args.output_dir) / "reward-model")
    if not args.reward_model_path:
        make_reward_model(args, machine, tokenizer, folder)
    return judge.with_model(load_reward_model(folder, dtype=machine.dtype), 1.0)


def train(
    learner: "Learner",
    tasks: Sequence[Question],
    rows: int,
    before: dict[str, float],
    score: Callable[[], dict[str, float]],
) -> None:
    """Take all steps, from the newest complete checkpoint if there is one; a stop ends the process.

    `score` measures on held-out rows meanwhile, `before` is what it found at first.
    """
    from train_callback import TrainCallback

    args = learner.args
    steps = args.max_steps or math.ceil(args.epochs * len(tasks) / args.rollouts)
    done = learner.restore()
    remark_plan(rows, len(tasks), steps, args)
    report, speed = TrainCallback(args.logging_steps, args.train_id, args.seq), llm.Speed(done)

    def tell(step: int, values: dict[str, float]) -> None:
        state = SimpleNamespace(global_step=step, max_steps=steps, log_history=[], is_world_process_zero=True)
        report.on_log(None, state, None, logs=values)

    log("StartTraining", args.model_name, args)
    deepe.catch_stop()
    if done == 0:  # a point at step 0 says that all later ones are void
        tell(0, before)
    for step in range(done + 1, steps + 1):
        values = learner.step(step, tasks)
        if step % args.logging_steps == 0 or step in (1, steps):
            values |= speed.gauges(step, steps, learner.tokens_seen)
            tell(step, values)
            llm.print_step(step, steps, "reward", values)
        if step % args.eval_steps == 0:
            with contextlib.suppress(Stopped):
                tell(step, score())
        stopping = deepe.stop_requested()
        if stopping or (step % args.save_steps == 0 and step < steps):
            learner.save(step)
        if stopping:
            llm.end_stopped(step)


@dataclass(frozen=True)
class Answers:
    """What a step learns from: one row for each answer, one column for each of its tokens."""

    tokens: Any
    mask: Any
    spoken: Any
    """1 for the tokens of an answer up to its end, 0 behind it."""
    log_probabilities: Any
    values: Any
    advantages: Any
    returns: Any


class Learner:
    """The policy (base model and adapter), its value head, and how both learn."""

    def __init__(
        self, args: argparse.Namespace, machine: llm.Machine, tokenizer: Any, judge: Judge, longest: int
    ) -> None:
        import torch
        from peft import get_peft_model

        self.args, self.tokenizer, self._judge = args, tokenizer, judge
        checkpointing = llm.plan_memory(args, machine, longest, method="ppo")
        base = llm.load_model(args, machine, tokenizer, dropout=False)
        llm.sample_as_scored(base)
        if not machine.four_bit:  # what is in 4 bits was loaded to where it stays
            base.to(machine.device)
        log("ConfigTrainingParams", f"{machine}, gradient checkpointing {checkpointing}", args)
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        if (start := start_of(args)) is None:
            with options_of(args).refusing():
                self.policy = get_peft_model(base, adapter_config(args, base, llm.linear_layers(base)))
        else:
            self.policy = load_start(args, base)
            self.policy.load_adapter(str(start), REFERENCE)
        hold_rows(self.policy)
        self.value_head = torch.nn.Linear(base.config.get_text_config().hidden_size, 1, device=machine.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self._weights = [weight for weight in self.policy.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._weights, "lr": args.learning_rate},
                {"params": self.value_head.parameters(), "lr": args.value_learning_rate},
            ],
            weight_decay=0.0,
            fused=args.optimizer == "adamw_torch_fused",
        )
        self.tokens_seen = 0
        self._orders: dict[int, list[int]] = {}

    def step(self, number: int, tasks: Sequence[Question]) -> dict[str, float]:
        """Answer, judge and learn; all chance hangs on the seed and the step, so that a resumed run goes on equally."""
        import torch

        torch.manual_seed(self.args.seed * 1_000_003 + number)
        chosen = self._asked_in(number, tasks)
        self.policy.eval()
        with torch.no_grad():
            answers, values = self._roll_out(chosen)
        self.policy.train()
        learned = [
            self._learn(answers, group)
            for _ in range(self.args.ppo_epochs)
            for group in self._groups(torch.randperm(len(chosen)))
        ]
        return values | {name: sum(each[name] for each in learned) / len(learned) for name in learned[0]}

    def _asked_in(self, number: int, tasks: Sequence[Question]) -> list[Question]:
        """Return the questions of a step; each comes once before one comes again, in an order of its epoch."""
        first = (number - 1) * self.args.rollouts
        places = [divmod(place, len(tasks)) for place in range(first, first + self.args.rollouts)]
        self._orders = {
            epoch: self._orders.get(epoch)
            or random.Random(f"{self.args.seed} {epoch}").sample(range(len(tasks)), len(tasks))
            for epoch in dict.fromkeys(epoch for epoch, _ in places)
        }
        return [tasks[self._orders[epoch][place]] for epoch, place in places]

    def _roll_out(self, tasks: list[Question]) -> tuple[Answers, dict[str, float]]:
        """Answer the questions, and work out which tokens were better than expected."""
        import torch

        prompts = [task.prompt for task in tasks]
        asked = [written(prompt, None, self.tokenizer, add_generation_prompt=True) for prompt in prompts]
        encoded = encode_prompts(self.tokenizer, asked).to(self.policy.device)
        width = encoded["input_ids"].shape[1]
        tokens = self.policy.generate(
            **encoded,
            max_new_tokens=self.args.max_content_length,
            do_sample=True,
            temperature=self.args.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        said = tokens[:, width:]
        ends = torch.isin(said, self._end_tokens(said.device))
        spoken = (ends.long().cumsum(1) - ends.long() == 0).float()
        mask = torch.cat([encoded["attention_mask"], spoken.long()], 1)

        current, values, _entropy = self._look_at(tokens, mask, said.shape[1])
        with as_reference(self.policy):
            reference, _values, _entropy = self._look_at(tokens, mask, said.shape[1])
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        judged = torch.tensor(self._judge.totals(texts, prompts, columns_of(tasks)), device=said.device)
        finished = (ends.float() * spoken).sum(1) > 0
        last = spoken.sum(1).long() - 1

        divergence = (current - reference) * spoken
        rewards = -self.args.kl_coef * divergence
        rewards[torch.arange(len(tasks)), last] += torch.where(finished, judged, judged - 1)  # an answer has an end
        advantages = advantages_of(rewards, values, spoken)
        self.tokens_seen += int(mask.sum())
        answers = Answers(
            tokens=tokens,
            mask=mask,
            spoken=spoken,
            log_probabilities=current,
            values=values,
            advantages=whitened(advantages, spoken),
            returns=advantages + values,
        )
        return answers, {
            "reward": judged.mean().item(),
            "reward_std": judged.std(correction=0).item(),
            "kl": divergence.sum(1).mean().item(),
            "answer_length": spoken.sum(1).mean().item(),
            "finished": finished.float().mean().item(),
            "learning_rate": self.args.learning_rate,
        }

    def _look_at(self, tokens: Any, mask: Any, count: int) -> tuple[Any, Any, Any]:
        """Return log probability, value and entropy at each of the last `count` tokens."""
        import torch

        parts = [
            self._look_at_few(tokens[start : start + size], mask[start : start + size], count)
            for size in (self.args.batch_size,)
            for start in range(0, len(tokens), size)
        ]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _look_at_few(self, tokens: Any, mask: Any, count: int) -> tuple[Any, Any, Any]:
        import torch

        seen = self.policy(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            logits_to_keep=count + 1,
            use_cache=False,
        )
        odds = (seen.logits[:, -count - 1 : -1].float() / self.args.temperature).log_softmax(-1)
        chosen = torch.gather(odds, 2, tokens[:, -count:, None])[..., 0]
        values = self.value_head(seen.hidden_states[-1][:, -count - 1 : -1].float())[..., 0]
        return chosen, values, -(odds.exp() * odds).sum(-1)

    def _groups(self, order: Any) -> Iterator[list[Any]]:
        """Yield the forward passes between two changes of weights, as places of answers."""
        size, passes = self.args.batch_size, self.args.grad_accum_steps
        for start in range(0, len(order), size * passes):
            yield list(order[start : start + size * passes].split(size))

    def _learn(self, answers: Answers, group: list[Any]) -> dict[str, float]:
        """Change the weights once."""
        import torch

        total = sum(answers.spoken[places].sum() for places in group)
        sums = {"loss": 0.0, "policy_loss": 0.0, "value_loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0}
        for places in group:
            spoken, count = answers.spoken[places], answers.spoken.shape[1]
            current, values, entropy = self._look_at_few(answers.tokens[places], answers.mask[places], count)
            ratio = (current - answers.log_probabilities[places]).exp()
            near = ratio.clamp(1 - self.args.clip, 1 + self.args.clip)
            gain = torch.minimum(ratio * answers.advantages[places], near * answers.advantages[places])
            old, wanted = answers.values[places], answers.returns[places]
            held = old + (values - old).clamp(-self.args.clip, self.args.clip)
            miss = 0.5 * torch.maximum((values - wanted) ** 2, (held - wanted) ** 2)

            parts = {
                "policy_loss": -gain,
                "value_loss": miss,
                "entropy": entropy,
                "clip_fraction": ((ratio - 1).abs() > self.args.clip).float(),
            }
            means = {name: (part * spoken).sum() / total for name, part in parts.items()}
            loss = means["policy_loss"] + VALUE_WEIGHT * means["value_loss"]
            loss.backward()
            for name, value in {"loss": loss, **means}.items():
                sums[name] += value.item()
        length = torch.nn.utils.clip_grad_norm_(
            [*self._weights, *self.value_head.parameters()], self.args.max_grad_norm
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {**sums, "grad_norm": float(length)}

    def _end_tokens(self, device: Any) -> Any:
        import torch

        ends = self.policy.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return torch.tensor(ends if isinstance(ends, list) else [ends], device=device)

    def save(self, step: int) -> None:
        """Write a checkpoint, as a whole or not at all."""
        import torch

        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        draft = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        self.policy.save_pretrained(draft, selected_adapters=[ADAPTER])
        self.tokenizer.save_pretrained(draft)
        state = {"optimizer": self._optimizer.state_dict(), "value_head": self.value_head.state_dict()}
        torch.save(state | {"tokens_seen": self.tokens_seen}, draft / STATE)
        (draft / "trainer_state.json").write_text(json.dumps({"global_step": step}), "utf-8")
        make_readable(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        deepe.checkpoint(folder, step)
        kept = sorted(folder.parent.glob("checkpoint-*"), key=lambda found: found.stat().st_mtime)
        for old in kept[: -self.args.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> int:
        """Take everything from the newest complete checkpoint; return its step, 0 without one."""
        import torch
        from peft import load_peft_weights, set_peft_model_state_dict

        folder = newest_checkpoint(Path(self.args.output_dir), self.args, [STATE])
        if folder is None:
            return 0
        set_peft_model_state_dict(self.policy, load_peft_weights(str(folder), device="cpu"))
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self.value_head.load_state_dict(state["value_head"])
        self.tokens_seen = state["tokens_seen"]
        return int(folder.name.removeprefix("checkpoint-"))


def advantages_of(rewards: Any, values: Any, spoken: Any) -> Any:
    """Generalized advantage estimation without discount: how much better it went on than the values said."""
    import torch

    found, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    values = values * spoken
    for place in reversed(range(rewards.shape[1])):
        following = values[:, place + 1] if place + 1 < rewards.shape[1] else 0.0
        ahead = (rewards[:, place] + following - values[:, place] + LAMBDA * ahead) * spoken[:, place]
        found[:, place] = ahead
    return found


def whitened(numbers: Any, spoken: Any) -> Any:
    """Return the numbers with mean 0 and variance 1 over the spoken tokens."""
    count = spoken.sum()
    mean = (numbers * spoken).sum() / count
    variance = ((numbers - mean) ** 2 * spoken).sum() / count
    return (numbers - mean) * (variance + 1e-8).rsqrt()


if __name__ == "__main__":
    main()
