"""Approval of code by a second person."""

import asyncio
from typing import Annotated

from fastapi import Depends, Path, Query

from app.api.dependencies import CallerDep, ReadSession, ServicesDep, WriteSession
from app.api.errors import problem_responses
from app.api.language import RequestLanguage
from app.api.pagination import InvalidCursor, InvalidSort, Page, PageParams, page_params
from app.api.routing import Router
from app.api.schemas.code_reviews import (
    CodeExamination,
    CodeReviewItem,
    CodeReviewRead,
    DecisionWrite,
    WithdrawnCode,
    examination_read,
    review_item,
    review_read,
    withdrawn,
)
from app.api.schemas.common import SHA256
from app.domain.access import Permission
from app.domain.code_review import ReviewState
from app.registry.methods.code_reviews import CodeUnpinned, OwnCode, ReviewStateConflict
from app.store.code_reviews import CodeReviewNotFound

router = Router(changes=Permission.APPROVE, prefix="/api/v1", tags=["code-reviews"])

Paging = Annotated[PageParams, Depends(page_params("created_at", default="-created_at"))]
Digest = Annotated[str, Path(description="Digest of the code.", examples=[SHA256], max_length=64)]
"""`{digest}` in the addresses."""


@router.get("/code-reviews", responses=problem_responses(InvalidCursor, InvalidSort))
async def list_code_reviews(
    session: ReadSession,
    services: ServicesDep,
    paging: Paging,
    state: Annotated[ReviewState | None, Query(description="Only reviews in this state.")] = None,
) -> Page[CodeReviewItem]:
    """List the code that waits for an approval, and that somebody decided on."""
    found = await services.methods.code_reviews.page(session, paging, state)
    return paging.page([review_item(row) for row in found.rows], found.next_position)


@router.get("/code-reviews/{digest}", responses=problem_responses(CodeReviewNotFound))
async def get_code_review(digest: Digest, services: ServicesDep, language: RequestLanguage) -> CodeExamination:
    """Read what would run, how it differs from what was approved before, who changed it, and what to look at.

    Nothing of the code is run. What is noted rests on names in the source: code that hides what it does is found by
    reading it only.
    """
    reviews = services.methods.code_reviews
    async with services.database.reading() as session:
        review = await reviews.get(session, digest)
    return examination_read(review, await asyncio.to_thread(reviews.examine, review), language)


@router.post(
    "/code-reviews/{digest}:approve",
    responses=problem_responses(CodeReviewNotFound, OwnCode, ReviewStateConflict, CodeUnpinned),
)
async def approve_code(
    digest: Digest, decision: DecisionWrite, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> CodeReviewRead:
    """Approve code that you have not changed. Jobs may start it from now on."""
    return review_read(await services.methods.code_reviews.approve(session, digest, by=caller, note=decision.note))


@router.post("/code-reviews/{digest}:reject", responses=problem_responses(CodeReviewNotFound, ReviewStateConflict))
async def reject_code(
    digest: Digest, decision: DecisionWrite, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> CodeReviewRead:
    """Reject code that waits. It may be approved later all the same."""
    return review_read(await services.methods.code_reviews.reject(session, digest, by=caller, note=decision.note))


@router.post("/code-reviews/{digest}:withdraw", responses=problem_responses(CodeReviewNotFound, ReviewStateConflict))
async def withdraw_approval(
    digest: Digest, decision: DecisionWrite, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> WithdrawnCode:
    """Withdraw an approval. Jobs that no node has taken yet end with `code_not_approved`; those that run go on."""
    review = await services.methods.code_reviews.withdraw(session, digest, by=caller, note=decision.note)
    return withdrawn(review, await services.code_approval.started_with(session, digest))
