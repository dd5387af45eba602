from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from app.domain.names import (
    complete_name,
    environment_name_violations,
    name_key,
    name_violations,
    online_name,
    produced_name,
)

TRAINING_ID = UUID("a1b2c3d4-0000-4000-8000-000000000000")
SAVING_ID = UUID("5e6f0000-0000-4000-8000-000000000000")
DEPLOYMENT_ID = UUID("0d0e0000-0000-4000-8000-000000000000")


def codes(name: str | None, **options: object) -> list[str]:
    return [v.code for v in name_violations(name, **options)]  # type: ignore[arg-type]


class TestNameViolations:
    @pytest.mark.parametrize(
        "name", ["a", "x" * 100, "金融微调", "Größe 2.0", "finance-sft_v1", "हिन्दी", "Mu\u0308ller", "3", "ü" * 100]
    )
    def test_accepts(self, name: str) -> None:
        assert codes(name) == []

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (None, ["missing_name"]),
            ("", ["missing_name"]),
            ("   ", ["missing_name"]),
            ("x" * 101, ["name_too_long"]),
            ("a/b", ["invalid_name"]),
            ("a:b", ["invalid_name"]),
            ("a\x00b", ["invalid_name"]),
            ("a\tb", ["invalid_name"]),
            ("a\u200bb", ["invalid_name"]),
            ("a\u202eb", ["invalid_name"]),
            ("😀", ["invalid_name"]),
            ("\u0301a", ["invalid_name"]),
            (".", ["name_without_letters"]),
            ("..", ["name_without_letters"]),
            (" a", ["name_has_outer_space"]),
            ("a ", ["name_has_outer_space"]),
            ("a\n", ["invalid_name"]),
            (" " + "/" * 101, ["name_too_long", "invalid_name", "name_has_outer_space"]),
            (str(TRAINING_ID), ["name_looks_like_id"]),
            (TRAINING_ID.hex.upper(), ["name_looks_like_id"]),
        ],
    )
    def test_refuses(self, name: str | None, expected: list[str]) -> None:
        assert codes(name) == expected

    def test_length_is_counted_in_normal_form(self) -> None:
        assert codes("u\u0308" * 100) == []

    def test_reserved_names_are_compared_by_key(self) -> None:
        assert [v.code for v in name_violations("Custom", "/name", reserved=("custom",))] == ["name_reserved"]

    def test_names_the_characters_to_leave_out_once_each(self) -> None:
        (violation,) = name_violations("a/b/c\x00")

        assert violation.params == {"characters": "/ U+0000"}


class TestNameKey:
    @pytest.mark.parametrize(
        ("one", "other"), [("Straße", "STRASSE"), ("Mu\u0308ller", "MÜLLER"), ("Σίσυφος", "ΣΊΣΥΦΟΣ"), ("A", "a")]
    )
    def test_same_name(self, one: str, other: str) -> None:
        assert name_key(one) == name_key(other)

    @pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("a-b", "a_b"), ("é", "e")])
    def test_different_names(self, one: str, other: str) -> None:
        assert name_key(one) != name_key(other)

    def test_key_of_a_key_is_the_key(self) -> None:
        assert name_key(name_key("\u1f80ǰ\u0345")) == name_key("\u1f80ǰ\u0345")


class TestEnvironmentNames:
    def test_follows_conda(self) -> None:
        assert environment_name_violations("trl-0.2_cu", "/conda_env") == []
        for name in ("a b", "a/b", "../x", "环境", "", "-x", "a\n"):
            assert environment_name_violations(name, "/conda_env") != []


class TestModelNames:
    def test_whole_chain(self) -> None:
        customized = produced_name(
            technical_name="Qwen2.5-1.5B",
            train_name="finance run",
            produced_at=datetime(2025, 11, 2, 12, tzinfo=UTC),
            job_id=TRAINING_ID,
        )
        complete = complete_name(source_name=customized, saving_id=SAVING_ID)
        online = online_name(source_name=complete, deployment_id=DEPLOYMENT_ID, quantization="q8_0")

        assert customized == "Qwen2.5-1.5B_finance-run_20251102_a1b2"
        assert complete == "Qwen2.5-1.5B_finance-run_20251102_a1b2_s_5e6f"
        assert online == "Qwen2.5-1.5B_finance-run_20251102_a1b2_s_5e6f_d_0d0e_q8_0"

    def test_online_straight_from_another_model_uses_its_name(self) -> None:
        assert online_name(source_name="Qwen2.5-1.5B", deployment_id=DEPLOYMENT_ID) == (
            "Qwen2.5-1.5B_d_0d0e_no_quantization"
        )

    def test_day_is_the_day_in_utc(self) -> None:
        shanghai = timezone(timedelta(hours=8))

        name = produced_name(
            technical_name="m", train_name="t", produced_at=datetime(2025, 1, 1, 7, tzinfo=shanghai), job_id=TRAINING_ID
        )

        assert name == "m_t_20241231_a1b2"

    def test_result_is_itself_a_valid_name(self) -> None:
        name = produced_name(
            technical_name="org/model:latest", train_name=" // ", produced_at=datetime.now(UTC), job_id=TRAINING_ID
        )

        assert name.startswith("org-model-latest_model_")
        assert name_violations(name) == []
