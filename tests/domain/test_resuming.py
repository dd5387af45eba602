"""Which changes leave a checkpoint usable."""

from typing import Any

import pytest

from app.domain.resuming import resumable

OLD = {"batch_size": 8, "grad_accum_steps": 1, "learning_rate": 0.1, "save_steps": 50, "lora_rank": 8}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"save_steps": 5, "logging_steps": 1, "gradient_checkpointing": "true"}, True),
        ({"batch_size": 4, "grad_accum_steps": 2}, True),
        ({"batch_size": 4}, False),
        ({"batch_size": "8"}, False),
        ({"learning_rate": 0.2}, False),
        ({"lora_rank": 16}, False),
        ({"max_steps": 900}, False),
        ({"something_of_theirs": 1}, False),
    ],
)
def test_resumable(changes: dict[str, Any], same: bool) -> None:
    assert resumable(OLD, {**OLD, **changes}) is same


def test_missing_counts_are_one() -> None:
    assert resumable({"batch_size": 8}, {"batch_size": 4, "grad_accum_steps": 2})
