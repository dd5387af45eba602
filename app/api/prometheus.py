"""Metrics for Prometheus.

Figures of the system come from the database when they are asked for, so every API process gives the same answer, and
are kept for a moment. Those of a process (HTTP, its memory and time) are its own and carry its number as a label.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from sqlalchemy.exc import IntegrityError
from starlette.types import Scope

from app.executor.nodes.backoff import TRANSIENT, log_failure
from app.store import statistics
from app.store.session import Database
from app.store.statistics import WAITING_BUCKETS, Figures, NodeFigures

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
KEPT_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 5.0
_FOLD_SECONDS: Final = 1.0
_UNMATCHED: Final = "unmatched"

Check = Callable[[], Any]
"""Awaitable; raises when what it asks does not answer."""


class HttpMetrics:
    """Counts requests by the template of their address, and how long it took until the answer began."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._process = str(os.getpid())
        self._requests = Counter(
            "deepe_http_requests", "Requests answered.", ("method", "route", "status", "process"), registry=registry
        )
        self._seconds = Histogram(
            "deepe_http_request_duration_seconds",
            "Seconds until the answer to a request began.",
            ("method", "route", "process"),
            buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=registry,
        )

    def observe(self, scope: Scope, *, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        route = getattr(scope.get("route"), "path", _UNMATCHED)
        # a method of the caller's invention must not become a series
        method = method if route != _UNMATCHED else "other"
        self._requests.labels(method, route, str(status), self._process).inc()
        self._seconds.labels(method, route, self._process).observe(seconds)


class Metrics:
    """All metrics that one API process exports."""

    def __init__(self, database: Database, *, redis: Check | None = None) -> None:
        self._database = database
        self._redis = redis
        self._registry = CollectorRegistry()
        self.http = HttpMetrics(self._registry)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._lock = asyncio.Lock()
        self._kept: bytes = b""
        self._kept_until = float("-inf")

    async def text(self) -> bytes:
        """Return the metrics in the text format; a database that is down is a metric, not an error."""
        system = await self._system_text()
        return system + generate_latest(self._registry)

    async def _system_text(self) -> bytes:
        async with self._lock:  # of several who ask at once one looks
            if time.monotonic() >= self._kept_until:
                figures, redis = await asyncio.gather(self._figures(), self._redis_answers())
                self._kept = _exposed(_system(figures, redis))
                self._kept_until = time.monotonic() + KEPT_SECONDS
            return self._kept

    async def _figures(self) -> Figures | None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                # the first scrape after a long time sums up much; what is left comes with the next ones
                until = time.monotonic() + _FOLD_SECONDS
                while await self._fold() and time.monotonic() < until:
                    pass
                async with self._database.reading() as session:
                    return await statistics.figures(session)
        except (*TRANSIENT, TimeoutError) as error:
            log_failure(logger, "metrics_without_database", error, {})
            return None

    async def _fold(self) -> bool:
        try:
            async with self._database.writing() as session:
                return await statistics.fold(session)
        except IntegrityError:  # another process wrote the first totals
            return True

    async def _redis_answers(self) -> bool | None:
        if self._redis is None:
            return None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._redis()
        except Exception:
            return False
        return True


class _Once(Collector):
    """Metrics that were made already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _exposed(metrics: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(list(metrics)))
    return generate_latest(registry)


def _system(figures: Figures | None, redis: bool | None) -> Iterator[Metric]:
    yield _gauge("deepe_database_up", "Whether the database answers.", {(): float(figures is not None)})
    if redis is not None:
        yield _gauge("deepe_redis_up", "Whether Redis answers.", {(): float(redis)})
    if figures is None:
        return
    yield from _queue(figures)
    yield from _past(figures)
    for name, help_text, value in _NODES:
        values = {(node.name,): number for node in figures.nodes if (number := value(node, figures.now)) is not None}
        yield _gauge(name, help_text, values, ("node",))
    yield _gauge(
        "deepe_webhook_deliveries_pending", "Messages that wait to be sent.", {(): float(figures.pending_messages)}
    )
    age = _age(figures.oldest_message, figures.now) if figures.oldest_message else 0.0
    yield _gauge("deepe_webhook_oldest_pending_age_seconds", "Age of the oldest message that waits.", {(): age})


def _queue(figures: Figures) -> Iterator[Metric]:
    waiting = {(entry.kind.value, entry.queue): entry for entry in figures.waiting}
    labels = ("kind", "queue")
    yield _gauge(
        "deepe_jobs_queued",
        "Jobs that wait for nothing but a node.",
        {key: float(entry.count) for key, entry in waiting.items()},
        labels,
    )
    yield _gauge(
        "deepe_jobs_oldest_queued_age_seconds",
        "Age of the oldest job that waits for nothing but a node.",
        {key: _age(entry.oldest, figures.now) for key, entry in waiting.items()},
        labels,
    )
    live = {(kind.value, status.value): float(count) for (kind, status), count in figures.live.items()}
    yield _gauge("deepe_jobs_live", "Jobs that nodes have claimed and not ended.", live, ("kind", "status"))


def _past(figures: Figures) -> Iterator[Metric]:
    totals = figures.totals
    yield _counter("deepe_jobs_ended", "Jobs that ended.", totals.ended, ("kind", "status", "reason"))
    yield _counter("deepe_attempts_ended", "Attempts that ended.", totals.attempts, ("kind", "reason"))
    waited = HistogramMetricFamily(
        "deepe_job_waiting_seconds",
        "Seconds between the submit of a job and its first launch; jobs behind others in a chain are left out.",
        labels=("kind",),
    )
    for kind, counts in totals.waited.items():
        waited.add_metric((kind,), _buckets(counts[:-1]), sum_value=counts[-1])
    yield waited


def _buckets(counts: Sequence[float]) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in WAITING_BUCKETS), "+Inf"]
    return [(bound, sum(counts[: index + 1])) for index, bound in enumerate(bounds)]


def _age(moment: datetime, now: datetime) -> float:
    return max((now - moment).total_seconds(), 0.0)


def _remaining(node: NodeFigures, now: datetime) -> float | None:
    return None if node.lease_expires_at is None else (node.lease_expires_at - now).total_seconds()


_NODES: Final[Sequence[tuple[str, str, Callable[[NodeFigures, datetime], float | None]]]] = (
    (
        "deepe_node_heartbeat_age_seconds",
        "Seconds since the node's last heartbeat.",
        lambda node, now: _age(node.heartbeat_at, now),
    ),
    ("deepe_node_dead", "Whether the node was declared dead.", lambda node, _: float(node.is_dead)),
    ("deepe_node_refusing", "Whether the node drains or refuses jobs.", lambda node, _: float(node.refuses)),
    ("deepe_node_accelerators", "Accelerators of the node.", lambda node, _: float(node.accelerators)),
    ("deepe_node_accelerators_leased", "Accelerators that attempts hold.", lambda node, _: float(node.leased)),
    (
        "deepe_node_accelerators_quarantined",
        "Accelerators out of use until it is proven that nothing runs on them.",
        lambda node, _: float(node.quarantined),
    ),
    (
        "deepe_node_lease_remaining_seconds",
        "Seconds until the first lease of the node's attempts ends; below 0 it is overdue.",
        _remaining,
    ),
)


def _gauge(name: str, help_text: str, values: Mapping[Any, float], labels: Sequence[str] = ()) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, help_text: str, values: Mapping[str, int], labels: Sequence[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(key.split("/"), value)
    return family
