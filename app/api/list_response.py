"""Pages of lists that fit in memory, sorted by a unique name."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from app.api.pagination import Page, PageParams

ItemT = TypeVar("ItemT")


def page_by_name(items: Iterable[ItemT], paging: PageParams, *, name: Callable[[ItemT], str]) -> Page[ItemT]:
    """Return the page of `items` that `paging` asks for."""
    after = None if paging.after is None else str(paging.after[0])
    rest = [
        item
        for item in sorted(items, key=name, reverse=paging.descending)
        if after is None or (name(item) < after if paging.descending else name(item) > after)
    ]
    shown = rest[: paging.limit]
    last = name(shown[-1]) if len(rest) > paging.limit else None
    return paging.page(shown, None if last is None else (last, last))
