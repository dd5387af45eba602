"""Reviews of code over the wire."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import Field

from app.api.schemas.common import JOB_ID, SHA256, RequestBody
from app.domain.code_review import Code, ReviewState
from app.domain.plain_text import shown
from app.domain.texts import Language, text
from app.domain.values import Value
from app.registry.methods.code_reviews import Change, Examination, Review
from app.store.tables import CodeDecisionRow, CodeReviewRow, JobRow

_MOST_FILES = 500


class DecisionWrite(RequestBody):
    """Why code is approved, rejected, or not approved any more."""

    note: str = Field(default="", max_length=2000, description="For those who come later.", examples=["Read it all."])


class ReviewedMethod(Value):
    """The method that ran the code first."""

    id: str
    name: str
    version: int


class CodeDecision(Value):
    """A decision on code."""

    state: ReviewState
    principal: str = Field(description="Who decided; stays when the name changes.", examples=["key:5b0e4c1e"])
    name: str = Field(description="Name of that caller at the time.", examples=["grace"])
    note: str
    created_at: datetime


class CodeReviewItem(Value):
    """Code of a stage and whether it may start."""

    digest: str = Field(description="Sha256 of all that decides what runs.", examples=[SHA256])
    state: ReviewState
    stage: str = Field(description="Or the parameter that names the file.", examples=["training"])
    file: str = Field(description="File of the stage; `-m NAME` for a module.", examples=["finance_sft.py"])
    method: ReviewedMethod | None = Field(description="Null for a call of DeepExtension's backend without a method.")
    created_at: datetime = Field(description="When it began to wait.")
    decided_by: str | None = Field(description="Name of who decided last.", examples=["grace"])
    decided_at: datetime | None
    note: str


class ReviewedFile(Value):
    """A file that runs."""

    path: str
    sha256: str = Field(examples=[SHA256])
    size: int
    changed: bool = Field(description="It is not what the approved version before it ran.")


class CodeAuthor(Value):
    """A caller that changed the code since the approved version before it."""

    principal: str = Field(examples=["key:5b0e4c1e"])
    name: str = Field(examples=["ada"])


class CodeReviewRead(CodeReviewItem):
    """A review with what it is judged by."""

    changed_by: list[CodeAuthor] = Field(description="They cannot approve it.")
    unknown_author: bool = Field(description="A part was changed outside of the API, nobody knows by whom.")
    approved_version: int | None = Field(description="Newest approved version of the stage before; null: none.")
    call: dict[str, object] = Field(description="How the method calls it, without what is default.")
    files: list[ReviewedFile] = Field(description=f"At most {_MOST_FILES}, the changed ones first.")
    file_count: int
    decisions: list[CodeDecision] = Field(description="The oldest first.")


class CodeDifference(Value):
    """How a file differs from the one that was approved."""

    path: str = Field(description="Empty: how the method calls the stage.", examples=["finance_sft.py"])
    change: Change
    executable: bool = Field(description="It has become a program that can be started.")
    diff: str = Field(description="Unified difference. Control characters, and what hides text, are escaped.")
    complete: bool = Field(
        description="False: the difference goes on, one of the files is no text, or they are too different to be "
        "compared. Read the file itself (`GET /methods/{method}/versions/{number}/files/{stage}`)."
    )


class CodeNote(Value):
    """Something to look at: a help for a person who reads the code, no verdict."""

    path: str
    line: int
    code: str = Field(examples=["code_network"])
    detail: str = Field(description="What it is, in the language of the request.")
    quoted: str = Field(description="The code that stands there.", examples=["import socket"])


class CodeExamination(CodeReviewRead):
    """A review with the difference to the approved version before it, and with what to look at."""

    differences: list[CodeDifference]
    not_compared: int = Field(description="Files that differ and are not among `differences`.")
    notes: list[CodeNote]
    not_read: int = Field(description="Files that nothing is noted of, because there are too many.")


class WithdrawnCode(CodeReviewRead):
    """Code whose approval was withdrawn."""

    running_jobs: list[str] = Field(
        description="Jobs that run it now, or that a node was about to start: they go on unless they are cancelled.",
        examples=[[JOB_ID]],
    )


def review_item(row: CodeReviewRow) -> CodeReviewItem:
    """Return a review as a list shows it."""
    method = None
    if row.method_id is not None and row.method_version is not None:
        method = ReviewedMethod(id=row.method_id, name=row.method_name or "", version=row.method_version)
    return CodeReviewItem(
        digest=row.digest,
        state=row.state,
        stage=row.stage,
        file=shown(Code.of(row.code).name),
        method=method,
        created_at=row.created_at,
        decided_by=row.decided_name,
        decided_at=row.decided_at,
        note=row.note,
    )


def review_read(review: Review) -> CodeReviewRead:
    """Return a review as it is shown alone."""
    before = review.base.tree if review.base is not None else {}
    files = [
        ReviewedFile(path=shown(path), sha256=file.sha256, size=file.size, changed=before.get(path) != file)
        for path, file in review.tree.items()
    ]
    files.sort(key=lambda file: (not file.changed, file.path))
    return CodeReviewRead(
        **review_item(review.row).model_dump(),
        changed_by=[
            CodeAuthor(principal=one.principal, name=one.name)
            for one in sorted(review.authors, key=lambda author: author.principal)
        ],
        unknown_author=review.unknown,
        approved_version=review.base.version if review.base is not None else None,
        call=dict(review.code.call),
        files=files[:_MOST_FILES],
        file_count=len(files),
        decisions=[_decision(row) for row in review.decisions],
    )


def examination_read(review: Review, examined: Examination, language: Language) -> CodeExamination:
    """Return a review with all that helps to judge it."""
    return CodeExamination(
        **review_read(review).model_dump(),
        differences=[
            CodeDifference(
                path=shown(one.path),
                change=one.change,
                executable=one.executable,
                diff=one.difference.text,
                complete=not (one.stopped or one.difference.cut or one.difference.binary),
            )
            for one in examined.differences
        ],
        not_compared=examined.not_compared,
        notes=[
            CodeNote(
                path=shown(note.path),
                line=note.line,
                code=f"code_{note.kind}",
                detail=text(f"code_{note.kind}", language, name=note.name),
                quoted=note.quoted,
            )
            for note in examined.notes
        ],
        not_read=examined.not_read,
    )


def withdrawn(review: Review, jobs: Sequence[JobRow]) -> WithdrawnCode:
    """Return code whose approval was withdrawn."""
    return WithdrawnCode(**review_read(review).model_dump(), running_jobs=[job.id for job in jobs])


def _decision(row: CodeDecisionRow) -> CodeDecision:
    return CodeDecision(
        state=row.state, principal=row.principal, name=row.name, note=row.note, created_at=row.created_at
    )
