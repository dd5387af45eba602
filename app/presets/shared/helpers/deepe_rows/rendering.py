"""What a model is given and what it learns: examples written by a chat template, token by token.

Training and preview use the same functions, so that a preview shows what is trained. `tokenizer` is one of
transformers, or anything with its `apply_chat_template`, call and special tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any

from .losses import THINK, THINK_END, check_kept, thoughts_in, thoughts_of
from .merging import with_merged_turns
from .problems import RowProblem
from .values import Answer, Conversation, Question, Text, Turn

OTHER_REASONING = ("[THINK]", "<|channel|>", "<seed:think>")
"""How templates mark reasoning that do not write it between `<think>` and `</think>`."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The tokens of one sequence; those from `start` on are learned, the others only given."""

    tokens: list[int]
    start: int
    place: str = ""
    notes: tuple[str, ...] = ()
    """Codes of what is worth telling."""
    example: Answer | Question | Text | None = None
    """What was written, with the turns as the template takes them."""

    @property
    def labels(self) -> list[int]:
        """The tokens that are learned at their places, -100 where none is."""
        return [-100] * self.start + self.tokens[self.start :]


@dataclass(frozen=True, slots=True)
class _Written:
    """A prompt, and the prompt with its answer, as a template writes them."""

    answer: Answer
    question: str
    whole: str
    notes: tuple[str, ...]


def render(example: Conversation | Text, tokenizer: Any) -> list[Rendered]:
    """Return the sequences of an example: one for each answer of a conversation. Raises `RowProblem`."""
    if isinstance(example, Text):
        return [render_text(example, tokenizer)]
    return [render_answer(answer, tokenizer) for answer in example.answers()]


def render_text(example: Text, tokenizer: Any) -> Rendered:
    """Return a document: what the tokenizer itself puts before a text, the text, and its end.

    The end of a document may be another token than that of an answer (`deepe_chat.end_turns`).
    """
    tokens = list(tokenizer(example.text)["input_ids"])
    end = getattr(tokenizer, "document_end_id", tokenizer.eos_token_id)
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return Rendered(tokens, 0, example.place, (), example)


def render_answer(answer: Answer, tokenizer: Any, writer: Any = None) -> Rendered:
    """Return the tokens of a prompt and its answer, as the template of `writer` (the tokenizer) writes both.

    A template that loses something of the row is a `RowProblem`: the model would learn something else than was given.
    """
    rendered, merged = with_merged_turns(
        answer.prompt, lambda turns: _answer(replace(answer, prompt=turns), tokenizer, writer or tokenizer)
    )
    return replace(rendered, notes=("turns_merged", *rendered.notes)) if merged else rendered


def render_answers(answers: Sequence[Answer], tokenizer: Any) -> list[Rendered | None]:
    """Return what `render_answer` makes of each answer; the tokenizer is called once. None: it raises `RowProblem`."""
    texts: list[tuple[_Written, bool] | None] = []
    for answer in answers:
        try:
            texts.append(with_merged_turns(answer.prompt, partial(_with_prompt, answer, tokenizer)))
        except RowProblem:
            texts.append(None)
    pairs = [text for one in texts if one is not None for text in (one[0].question, one[0].whole)]
    encoded = iter(tokenizer(pairs, add_special_tokens=False)["input_ids"] if pairs else ())
    found: list[Rendered | None] = []
    for one in texts:
        if one is None:
            found.append(None)
            continue
        head, tokens = list(next(encoded)), list(next(encoded))
        try:
            rendered = _encoded(one[0], head, tokens, tokenizer, tokenizer)
        except RowProblem:
            found.append(None)
            continue
        found.append(replace(rendered, notes=("turns_merged", *rendered.notes)) if one[1] else rendered)
    return found


def _with_prompt(answer: Answer, writer: Any, turns: Sequence[Turn]) -> _Written:
    return _written(replace(answer, prompt=turns), writer)


def render_question(question: Question, tokenizer: Any) -> Rendered:
    """Return the tokens of a prompt that the model answers by itself."""
    rendered, merged = with_merged_turns(
        question.prompt, lambda turns: _question(replace(question, prompt=turns), tokenizer)
    )
    return replace(rendered, notes=("turns_merged", *rendered.notes)) if merged else rendered


def asked(turns: Sequence[Turn], writer: Any) -> str:
    """Return a conversation as a model is asked it: written as in training. Raises `RowProblem`."""

    def ask(turns: Sequence[Turn]) -> str:
        text = written(turns, None, writer, add_generation_prompt=True)
        for _told in check_kept(turns, None, text, writer):
            pass
        return text

    return with_merged_turns(turns, ask)[0]


def _answer(answer: Answer, tokenizer: Any, writer: Any) -> Rendered:
    one = _written(answer, writer)
    return _encoded(one, _tokens(one.question, tokenizer), _tokens(one.whole, tokenizer), tokenizer, writer)


def _written(answer: Answer, writer: Any) -> _Written:
    turns = [*answer.prompt, answer.completion]
    question = written(answer.prompt, answer.tools, writer, add_generation_prompt=True)
    whole = written(turns, answer.tools, writer, add_generation_prompt=False)
    try:
        return _Written(answer, question, whole, tuple(check_kept(turns, answer.tools, whole, writer)))
    except RowProblem as problem:
        if problem.code != "reasoning_lost" or (mended := _with_reasoning(answer, question, writer)) is None:
            raise
        return mended


def _encoded(one: _Written, head: list[int], tokens: list[int], tokenizer: Any, writer: Any) -> Rendered:
    answer, turns = one.answer, [*one.answer.prompt, one.answer.completion]
    notes = list(one.notes)
    if tokens[: len(head)] == head:
        shared = len(head)
    else:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(head, tokens, strict=False)))
    if shared < len(head):
        if not one.whole.startswith(written(answer.prompt, answer.tools, writer, add_generation_prompt=False).rstrip()):
            raise RowProblem("prompt_rewritten")
        if one.question.rstrip().endswith(THINK_END) and thoughts_of(answer.completion):
            raise RowProblem("reasoning_not_asked", turn=len(turns))
        notes.append("prompt_not_prefix")
    notes += _beginning(tokens, tokenizer)
    notes += _ending(tokens[shared:], tokenizer)
    if thoughts_in(one.whole) > sum(map(thoughts_of, turns)):
        notes.append("think_block_added")
    return Rendered(tokens, shared, answer.place, tuple(dict.fromkeys(notes)), answer)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _question(question: Question, tokenizer: Any) -> Rendered:
    text = written(question.prompt, question.tools, tokenizer, add_generation_prompt=True)
    tokens = _tokens(text, tokenizer)
    notes = [*check_kept(question.prompt, question.tools, text, tokenizer), *_beginning(tokens, tokenizer)]
    return Rendered(tokens, len(tokens), question.place, tuple(dict.fromkeys(notes)), question)


def written(turns: Sequence[Turn], tools: Sequence[Any] | None, tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """Return a conversation as the chat template writes it, if asked for with the beginning of the next answer."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except Exception as error:  # a template is a program: whatever it raises is its way to refuse
        raise RowProblem("template_refused", error=str(error) or type(error).__name__) from error


def chunks(rendered: Rendered, longest: int) -> Iterator[Rendered]:
    """Split a document that is longer than `longest` tokens; every token stays, the end of text comes once."""
    for start in range(0, len(rendered.tokens), longest):
        yield Rendered(rendered.tokens[start : start + longest], 0, rendered.place, rendered.notes, rendered.example)


# ---- reasoning -------------------------------------------------------------------------------------------------------


def _with_reasoning(answer: Answer, question: str, writer: Any) -> _Written | None:
    """Return what is learned where a template throws the reasoning of an answer away, as that of DeepSeek R1 does.

    The question as it is asked, the reasoning and the answer as the row gives them, and what the template writes behind
    an answer: what the model has to say when it is asked. `None` if the template writes them otherwise, or the answer
    is one of parts, which the trainer of a model that sees writes by the template itself.
    """
    text, template = answer.completion["content"], str(getattr(writer, "chat_template", ""))
    calls = answer.completion.get("tool_calls")
    if not isinstance(text, str) or calls or any(mark in template for mark in OTHER_REASONING):
        return None
    before, behind = _around(answer, writer)
    if before is None or not question.startswith(before):
        return None
    opening = question[len(before) :]
    if THINK_END in opening:
        raise RowProblem("reasoning_not_asked", turn=len(answer.prompt) + 1)
    if opening.strip() not in ("", THINK):
        return None
    thought, said = answer.completion.get("reasoning_content"), text
    if thought:
        text = f"{THINK}\n{thought.strip()}\n{THINK_END}\n\n{text.lstrip()}"
    else:
        said = text.rpartition(THINK_END)[2]
    if opening and text.lstrip().startswith(THINK):
        text = text.lstrip().removeprefix(THINK)
        text = text.lstrip("\n") if opening.endswith("\n") else text
    whole = f"{question}{text}{behind}"
    bare = {name: value for name, value in answer.completion.items() if name != "reasoning_content"}
    bare["content"] = said
    notes = tuple(check_kept([*answer.prompt, bare], answer.tools, whole, writer))
    return _Written(answer, question, whole, (*notes, "reasoning_restored"))


def _around(answer: Answer, writer: Any) -> tuple[str | None, str]:
    """Return what a template writes before an answer and behind it, `None` if the answer does not stand in it once."""
    mark = "xqanswerq"
    turn = {"role": "assistant", "content": mark}
    before, found, behind = written(
        [*answer.prompt, turn], answer.tools, writer, add_generation_prompt=False
    ).rpartition(mark)
    return (before, behind) if found and mark not in before else (None, "")


# ---- beginning and end -----------------------------------------------------------------------------------------------


def _beginning(tokens: list[int], tokenizer: Any) -> Iterable[str]:
    """Tell when the tokenizer begins every text with a token that the template leaves out."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and tokens[:1] != [first] and list(tokenizer("")["input_ids"])[:1] == [first]:
        return ("bos_missing",)
    return ()


def _ending(learned: list[int], tokenizer: Any) -> Iterable[str]:
    """Tell when an answer has no end that is learned, or one at which answering does not stop."""
    if tokenizer.eos_token_id in learned:
        return ()
    return ("end_is_not_eos",) if special_ids(tokenizer).intersection(learned) else ("answer_without_end",)


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the special tokens, also those that have no role (eos, pad, ...), such as the end of a turn."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset([*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)])
