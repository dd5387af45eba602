import base64
from datetime import timedelta

import pytest

from app.domain.enums import JobKind, JobStatus
from app.domain.kinds import KINDS
from app.domain.webhooks import (
    MAX_TRIES,
    WebhookEvent,
    event_of,
    new_secret,
    next_delay,
    secret_violations,
    signed_headers,
    url_violations,
)


class TestSignature:
    def test_is_that_of_the_specification(self) -> None:
        # the example that the reference libraries of Standard Webhooks are tested with
        headers = signed_headers(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            message="msg_p5jXN8AQM9LWM0D4loKWxJek",
            timestamp=1614265330,
            body=b'{"test": 2432232314}',
        )

        assert headers == {
            "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "webhook-timestamp": "1614265330",
            "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        }

    def test_new_secrets_are_valid_and_differ(self) -> None:
        first, second = new_secret(), new_secret()

        assert first != second
        assert secret_violations(first) == []

    @pytest.mark.parametrize(
        "secret",
        ["", "whsec_", "whsec_no base64!", "whsec_" + base64.b64encode(b"short").decode(),
         "whsec_" + base64.b64encode(b"x" * 65).decode(), base64.b64encode(b"x" * 32).decode()],
    )  # fmt: skip
    def test_refuses_a_weak_or_foreign_secret(self, secret: str) -> None:
        assert [violation.code for violation in secret_violations(secret)] == ["invalid_webhook_secret"]


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("https://example.com/hooks?key=1", None),
            ("http://[::1]:8080/x", None),
            ("ftp://example.com", "invalid_webhook_url"),
            ("example.com", "invalid_webhook_url"),
            ("http://", "invalid_webhook_url"),
            ("http://host:0/", "invalid_webhook_url"),
            ("http://host:99999/", "invalid_webhook_url"),
            ("http://host/a b", "invalid_webhook_url"),
            ("http://host/\r\nx: y", "invalid_webhook_url"),
            ("http://host/#part", "invalid_webhook_url"),
            ("http://host\\@evil/", "invalid_webhook_url"),
            ("http://user:password@host/", "url_with_credentials"),
            ("http://host/" + "x" * 2000, "invalid_webhook_url"),
        ],
    )
    def test_urls(self, url: str, code: str | None) -> None:
        found = [violation.code for violation in url_violations(url)]

        assert found == ([] if code is None else [code])


class TestTries:
    def test_span_about_a_day_and_end(self) -> None:
        delays = [next_delay(tries, chance=0.5) for tries in range(1, MAX_TRIES)]
        total = sum((delay for delay in delays if delay is not None), timedelta())

        assert timedelta(hours=18) < total < timedelta(hours=30)
        assert delays[0] == timedelta(seconds=5)
        assert next_delay(MAX_TRIES, chance=0.5) is None

    def test_what_the_receiver_asks_for_counts_within_a_day(self) -> None:
        assert next_delay(1, chance=0, requested=timedelta(minutes=9)) == timedelta(minutes=9)
        assert next_delay(1, chance=0, requested=timedelta(0)) == timedelta(seconds=4)
        assert next_delay(1, chance=0, requested=timedelta(days=999)) == timedelta(days=1)


class TestEvents:
    def test_every_end_of_every_kind_has_a_name(self) -> None:
        ends = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)

        assert all(
            (event_of(kind, status) is None) == (KINDS[kind].event_subject is None)
            for kind in JobKind
            for status in ends
        )

    def test_only_jobs_tell_their_start(self) -> None:
        assert event_of(JobKind.TRAINING, JobStatus.RUNNING) is WebhookEvent.JOB_STARTED
        assert event_of(JobKind.INFERENCE_CUSTOMIZED, JobStatus.RUNNING) is None
        assert event_of(JobKind.TRAINING, JobStatus.QUEUED) is None
