"""What an inference script prints, and what of it reaches the caller."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.executor.runs.inference_protocol import AnswerChunk, Done, Failure, FinishReason, InferenceParser, Noise

OUTPUT = (
    "Loading checkpoint shards\r 50%\r100%\n"
    '{"status": "resp", "text": "Gr\u00fc\u00dfe"}\n'
    "the status is fine\n"
    '{"status": "resp", "text": ", \\ud83d\\ude80\\n"}\r\n'
    '{"status": "loading", "text": "secret"}\n'
    "{half\n"
    "\n"
    '{"status": "done", "finish_reason": "length", "usage": {"tokens": 3}}'
)


def parse(*pieces: str) -> tuple[list[object], InferenceParser]:
    parser = InferenceParser()
    events: list[object] = [event for piece in pieces for event in parser.feed(piece)]
    return events + list(parser.close()), parser


class TestInferenceParser:
    def test_passes_on_pieces_and_keeps_noise_back(self) -> None:
        events, parser = parse(OUTPUT)

        assert events == [
            Noise("100%"),
            AnswerChunk("Grüße"),
            Noise("the status is fine"),
            AnswerChunk(", 🚀\n"),
            Noise('{"status": "loading", "text": "secret"}'),
            Noise("{half"),
            Done(FinishReason.LENGTH, {"tokens": 3}),
        ]
        assert parser.finish_reason(succeeded=True) is FinishReason.LENGTH

    @given(cuts=st.lists(st.integers(min_value=0, max_value=len(OUTPUT)), max_size=20))
    def test_gives_the_same_wherever_the_output_is_cut(self, cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), len(OUTPUT)]
        pieces = [OUTPUT[begin:end] for begin, end in pairwise(edges)]

        assert parse(*pieces)[0] == parse(OUTPUT)[0]

    def test_a_failure_is_told_with_its_traceback(self) -> None:
        events, parser = parse('{"status":"error","error":"no GPU","traceback":"Trace"}\n{"status":"error"}\n')

        assert events == [Failure("no GPU", "Trace"), Failure("the script gave no reason", None)]
        assert parser.finish_reason(succeeded=True) is FinishReason.ERROR

    @pytest.mark.parametrize(
        ("succeeded", "cancelled", "reason"),
        [(True, False, "stop"), (False, False, "error"), (True, True, "cancelled"), (False, True, "cancelled")],
    )
    def test_there_always_is_a_finish_reason(self, succeeded: bool, cancelled: bool, reason: str) -> None:
        assert InferenceParser().finish_reason(succeeded=succeeded, cancelled=cancelled) == reason

    def test_output_between_an_object_and_its_newline_is_noise(self) -> None:
        events, _ = parse('{"status":"resp","text":"a"}WARNING: slow\n{"status":"resp","text":7}\n')

        assert events == [AnswerChunk("a"), Noise("WARNING: slow"), AnswerChunk("7")]

    def test_a_huge_piece_comes_through_and_an_absurd_line_does_not_fill_the_memory(self) -> None:
        line = json.dumps({"status": "resp", "text": "x" * 3_000_000}) + "\n"

        events, _ = parse(*(line[n : n + 65536] for n in range(0, len(line), 65536)))
        absurd, _ = parse(*["y" * 1_000_000] * 20, "\n", '{"status":"resp","text":"a"}\n')

        assert events == [AnswerChunk("x" * 3_000_000)]
        assert absurd == [Noise("y" * 1000), AnswerChunk("a")]

    @pytest.mark.parametrize("line", ["[" * 50_000, "NaN", "null", '{"status": ["resp"]}', '{"status": "resp"}'])
    def test_foreign_json_is_noise(self, line: str) -> None:
        events, _ = parse(line + "\n")

        assert events == [Noise(line)]

    def test_half_a_surrogate_pair_can_be_sent(self) -> None:
        events, _ = parse('{"status":"resp","text":"\\ud83d"}\n')

        assert events == [AnswerChunk("?")]
