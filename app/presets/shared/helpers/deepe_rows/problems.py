"""What can be wrong with a row, and what is worth telling about one: a code, a place inside the row, a sentence."""

import json
from collections.abc import Mapping
from typing import Any

SENTENCES: Mapping[str, str] = {
    # wrong: the row cannot be read
    "row_not_object": "a JSON object is expected, it is {found}",
    "row_columns_missing": (
        "the columns to learn from are missing; there are: {columns}. Name the columns in input_train_name and "
        "output_train_name, or use one of these: {wanted}"
    ),
    "row_columns_unknown": ("the columns to learn from are missing; there are: {columns}. Use one of these: {wanted}"),
    "row_column_missing": "no row has the column '{column}'; there are: {columns}",
    "row_forms_several": (
        "the row can be read in several ways: {forms}. Say which one with data_form, or name the columns "
        "with input_train_name and output_train_name"
    ),
    "row_form_not_learned": (
        "the row is written as {form}, which is not learned here. Use one of these: {wanted}; "
        "or say with data_form as which of them the row is meant"
    ),
    "turns_not_list": "a conversation is a list of turns, this is {found}",
    "turns_empty": "the conversation has no turns",
    "turn_not_object": "a turn is an object with role and content, this is {found}",
    "turn_role_missing": "the turn has no role",
    "turn_role_unknown": "'{role}' is no known role; known are: {known}",
    "turn_content_missing": "the turn has no content",
    "turn_part_invalid": "a part of a turn is a text or a picture, this is {found}",
    "turn_key_twice": "'{first}' and '{second}' say different things; keep one of them",
    "tool_calls_invalid": "a tool call is an object with the name of a function and its arguments, this is {found}",
    "tool_arguments_invalid": "the arguments of a tool call are a JSON object, this is {found}",
    "tools_invalid": "tools is a list of functions, each an object with a name; this is {found}",
    "weight_invalid": "a weight is 0 (given, not learned) or 1 (learned), this is {found}",
    "system_twice": "the row has a system column, and the conversation begins with a system turn; keep one of them",
    "system_not_first": "a system turn stands first, this one is turn {turn}",
    "history_invalid": "history is a list of pairs [question, answer], this is {found}",
    "text_invalid": "a text is expected, this is {found}",
    "label_invalid": "label must be true or false, it is {found}",
    "grade_invalid": "label must be true, false or a number of at least 0 that grades the document, it is {found}",
    "pair_prompts_differ": "chosen and rejected must be the same conversation up to the last answer",
    "answer_turns_several": "{column} must be one answer of the assistant; it has {count} turns",
    "pictures_invalid": 'pictures are named by a file or a list of files, such as [{{"imageId": "name.png"}}]',
    "pictures_marks_differ": "{marks} times {mark}, but {pictures} pictures",
    "pictures_named_twice": "the turns name other pictures than the column '{column}'; keep one of them",
    "picture_missing": "no column names a picture; use one of these: {columns}",
    "caption_pictures_several": "a caption belongs to one picture; the row names {count}",
    "picture_in_answer": "a picture stands in an answer; the model can only be shown pictures",
    "picture_without_question": "no turn of a user that the pictures could belong to",
    "pictures_not_learned": "the row has pictures; this method learns from text",
    "tools_not_learned": "the row has tools or tool calls; this method does not learn them",
    "template_refused": "the chat template of the base model refuses the row: {error}",
    "system_turn_lost": "the chat template leaves out the system turn; take it out, or put it into the first question",
    "user_turn_lost": "the chat template leaves out turn {turn}",
    "assistant_turn_lost": "the chat template leaves out turn {turn}",
    "tool_turn_lost": "the chat template leaves out what a tool answered in turn {turn}; take a base that knows tools",
    "prompt_rewritten": "the chat template writes the question otherwise when an answer follows; some would be learned",
    "tools_lost": "the chat template leaves out the tools; take a base model that knows tools",
    "tool_calls_lost": "the chat template leaves out the tool calls of turn {turn}; take a base model that knows tools",
    "reasoning_lost": (
        "the chat template leaves out the reasoning of turn {turn}; take it out of the rows, "
        "or take a base model whose template keeps it"
    ),
    "reasoning_not_asked": (
        "turn {turn} has reasoning, but the question ends without any (enable_thinking is false); take it out of the "
        "rows, or leave enable_thinking out"
    ),
    # left out: the row is readable, and there is nothing to learn in it
    "no_answer": "there is no answer to learn",
    "no_text": "there is no text to learn",
    "all_weights_zero": "every answer has the weight 0",
    # worth telling: the row is used
    "answer_absent": "an answer without content is left out of what is learned",
    "input_empty": "the input is empty",
    "answer_empty": "the answer is empty: the model learns to say nothing",
    "answer_not_text": "the answer is no text: its JSON is learned",
    "input_not_text": "the input is no text: its JSON is given",
    "turns_after_answer": "turns after the last answer are neither given nor learned",
    "answer_without_question": "an answer that nothing comes before is given, not learned",
    "turns_merged": (
        "the chat template takes no system turn, or only roles that alternate: the system's text begins the question, "
        "questions in a row are one"
    ),
    "prompt_not_prefix": "the question ends otherwise when it is asked than in what is learned",
    "bos_missing": "the chat template leaves out the token that the tokenizer begins texts with",
    "answer_without_end": "the answer has no token that ends it: the model does not learn to stop",
    "end_is_not_eos": "the answer ends with a token at which answering does not stop",
    "think_block_added": "the chat template adds an empty block of reasoning to the answer",
    "earlier_reasoning_left_out": "the chat template leaves out the reasoning of earlier answers, as when it is asked",
    "reasoning_restored": (
        "the chat template leaves out the reasoning of the answer: it is learned as the row gives it, behind the "
        "question as it is asked"
    ),
    "names_left_out": "the chat template leaves out names of turns",
    "text_cut": "a text is longer than max_seq_length or than the base model reads; the rest of it is not read",
    "text_split": "the text is longer than allowed and is learned in several pieces",
    "answer_too_long": "an answer is longer than allowed, with all that comes before it, and is left out",
    "row_too_long": "the row is longer than allowed and is left out",
    "pair_equal": "chosen and rejected are the same: nothing is preferred",
    "column_unused": "column '{column}' is not used",
    "key_unused": "'{key}' of a turn is not used",
}
"""The English sentence of each code; other languages are with what shows them."""


class Refused(Exception):
    """What the user can put right: one sentence, no traceback."""


class RowProblem(Exception):
    """What makes a row unreadable. `pointer` is the place inside the row, as RFC 6901 writes it."""

    def __init__(self, code: str, pointer: str = "", **params: Any) -> None:
        super().__init__(code, pointer)
        self.code = code
        self.pointer = pointer
        self.params = params

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self) -> str:
        said = SENTENCES[self.code].format(**self.params)
        return f"{self.pointer}: {said}" if self.pointer else said


def shown(value: Any) -> str:
    """Return a value as a message shows it: its JSON, cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
