"""Over the wire: records of the audit trail."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from app.domain.audit import AuditKind, AuditRecord, KeptRecord, Verification, canonical
from app.domain.texts import Language, text
from app.domain.values import Value
from app.store.tables import AuditRecordRow

_HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_DETAILS = {
    "things": [
        {
            "kind": "queue",
            "id": "night",
            "name": "night",
            "done": "changed",
            "fields": {"max_live": [4, 8]},
        }
    ]
}


class AuditRecordRead(Value):
    """One record of the audit trail."""

    number: int = Field(description="One more than that of the record before.", examples=[1042])
    at: datetime
    kind: AuditKind = Field(
        description="`change`: rows or files were changed; `action`: a call succeeded and changed nothing that is "
        "recorded; `launch`: a node took a job, to start its code; `refusal`: not permitted, or a wrong token, "
        "repeats in one record; `removal`: the oldest records were removed because of their age."
    )
    caller_kind: str = Field(
        description="How the caller was known: as in `GET /me`; `command`: a `deepe` command on the database; "
        "`node`: a worker; `service`: the service itself; `unknown`: nobody was recognized.",
        examples=["key"],
    )
    caller: str = Field(examples=["nightly-training"])
    principal: str = Field(
        description="What stays the same when the caller's name changes.",
        examples=["key:2f6d1c8a-5b7e-4d3f-9a0c-1e2d3c4b5a69"],
    )
    address: str | None = Field(description="The caller's address, behind a proxy that is allowed to say it.")
    request_id: str | None = Field(description="`X-Request-Id`, as in the service's log.")
    operation: str = Field(
        description="Operation id of the route; `launch`, `start`, `retention`, `restore`, `authenticate`.",
        examples=["set_queue_limits"],
    )
    project: str | None = Field(description="Whose things were changed; null where they are the installation's.")
    details: dict[str, Any] = Field(
        description="`things`: what was changed, with `fields` as `[before, after]`, `(hidden)` where a secret "
        "changed, digest and size where a value is long. `files`: SHA-256 before and after. `sent`: a body that is "
        "a file. `launch`, `refusal`, `removed`: of records of these kinds.",
        examples=[_DETAILS],
    )
    previous: str = Field(description="Hash of the record before.", examples=["0" * 64])
    hash: str = Field(description="SHA-256 of everything else, as canonical JSON.", examples=[_HASH])


def audit_record_read(row: AuditRecordRow) -> AuditRecordRead:
    """Return a record as it is shown."""
    fields: dict[str, Any] = {
        name: getattr(row, name) for name in AuditRecordRead.model_fields if name not in ("details", "project")
    }
    return AuditRecordRead(**fields, project=row.project_id, details=json.loads(row.details))


def kept_record(shown: AuditRecordRead) -> KeptRecord:
    """Return the record that was shown or exported, for its verification."""
    fields = {
        name: getattr(shown, name) for name in AuditRecord.__dataclass_fields__ if name not in ("details", "project_id")
    }
    record = AuditRecord(**fields, project_id=shown.project, details=canonical(shown.details))
    return KeptRecord(record, shown.hash)


class AuditProblem(Value):
    """What is wrong with the audit trail, at which record."""

    number: int = Field(description="Number of the record that is wrong, or that is missing.", examples=[1042])
    code: str = Field(examples=["audit_record_changed"])
    detail: str = Field(examples=["Record 1042 is not what was written, or its hash is not."])


class AuditVerification(Value):
    """Whether the audit trail is whole."""

    sound: bool = Field(description="Whether nothing is wrong.")
    first: int = Field(description="Number of the oldest record; 0 where there is none.", examples=[1])
    last: int = Field(description="Number of the newest record; 0 where there is none.", examples=[1042])
    hash: str = Field(
        description="Hash of the newest record: keep it elsewhere, and expect it later.", examples=[_HASH]
    )
    records: int = Field(examples=[1042])
    problem_count: int = Field(examples=[0])
    problems: Sequence[AuditProblem] = Field(description="The first of what is wrong.")


def audit_verification(found: Verification, language: Language) -> AuditVerification:
    """Return what a verification found as it is shown."""
    problems = [
        AuditProblem(number=one.number, code=one.code, detail=text(one.code, language, number=one.number))
        for one in found.problems
    ]
    return AuditVerification(
        sound=found.sound,
        first=found.first,
        last=found.head.number,
        hash=found.head.hash,
        records=found.records,
        problem_count=found.problem_count,
        problems=problems,
    )
