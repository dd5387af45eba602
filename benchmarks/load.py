"""Many clients and many streams for minutes: errors, how long answers take, and the API's memory, minute by minute.

    python -m benchmarks.load                          # 200 clients, 500 streams, 10 minutes
    python -m benchmarks.load --minutes 2

Clients ask one after the other without a pause: nine of ten requests read (lists, a job, parameters), one queues a job
and cancels it. Streams follow a job that waits. Clients and service share the machine's processors.
"""

import argparse
import asyncio
import itertools
import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.service import ApiProcess, api_process

API: Final = "/api/v1"
JOB: Final = {"method": "Custom01", "base_model": "custom01-base", "dataset": "custom01", "through": "complete"}
READS: Final = ("/jobs", "/methods", "/datasets", "/models", "/me", "/queues", "/methods/Custom01/parameters")


@dataclass
class Minute:
    """What happened in one minute."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients and streams at one service."""

    def __init__(self, url: str, *, clients: int, streams: int, minutes: float) -> None:
        self._clients, self._streams = clients, streams
        self._start, self._length = 0.0, minutes * 60
        self._http = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))
        self.minutes: list[Minute] = [Minute() for _ in range(int(minutes + 0.999))]
        self.open_streams = 0
        self.stream_failures: Counter[str] = Counter()
        self._all_open = asyncio.Event()
        if not streams:
            self._all_open.set()

    async def run(self, watch: Any) -> None:
        """Call for the whole time; `watch` is called once a minute."""
        async with self._http:
            waiting = (await self._http.post(f"{API}/jobs", json={**JOB, "wait": True})).raise_for_status().json()
            streams = [asyncio.create_task(self._follow(waiting["id"])) for _ in range(self._streams)]
            await self._all_open.wait()
            self._start = time.monotonic()
            clients = [asyncio.create_task(self._call(number)) for number in range(self._clients)]
            for minute in range(len(self.minutes)):
                await asyncio.sleep(max(self._start + 60 * (minute + 1) - time.monotonic(), 0))
                watch(minute)
            await asyncio.gather(*clients)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _follow(self, job: str) -> None:
        try:
            async with self._http.stream("GET", f"{API}/jobs/{job}/events", timeout=60) as response:
                response.raise_for_status()
                self.open_streams += 1
                if self.open_streams == self._streams:
                    self._all_open.set()
                async for _ in response.aiter_bytes():
                    pass
            self.stream_failures["ended"] += 1
        except httpx.HTTPError as error:
            self.stream_failures[type(error).__name__] += 1
        self._all_open.set()

    async def _call(self, number: int) -> None:
        for turn in itertools.count(number):
            if time.monotonic() - self._start >= self._length:
                return
            if turn % 10:
                await self._timed("GET", READS[turn % len(READS)])
            else:
                made = await self._timed("POST", "/jobs", json={**JOB, "wait": True})
                if made is not None:
                    await self._timed("POST", f"/jobs/{made['id']}:cancel")

    async def _timed(self, method: str, path: str, **options: Any) -> Any:
        began = time.monotonic()
        minute = self.minutes[min(int((began - self._start) / 60), len(self.minutes) - 1)]
        try:
            response = await self._http.request(method, API + path, **options)
        except httpx.HTTPError as error:
            minute.failures[type(error).__name__] += 1
            return None
        minute.seconds.append(time.monotonic() - began)
        if response.is_error:
            minute.failures[f"{response.status_code} {path}"] += 1
            return None
        return response.json()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with api_process() as api:
        load = Load(
            f"http://127.0.0.1:{api.port}", clients=options.clients, streams=options.streams, minutes=options.minutes
        )
        print("minute  requests  median ms   p99 ms  errors  streams  API MiB")
        asyncio.run(load.run(lambda minute: _print(minute, load, api)))
    p99s = [_p99(minute.seconds) for minute in load.minutes]
    errors = sum(minute.failures.total() for minute in load.minutes) + load.stream_failures.total()
    print(f"slowest p99 / first p99: {max(p99s) / p99s[0]:.2f}; errors: {errors}")
    for said in (sum((minute.failures for minute in load.minutes), Counter()), load.stream_failures):
        for what, count in said.most_common(5):
            print(f"  {what}: {count}")
    return int(errors > 0)


def _print(number: int, load: Load, api: ApiProcess) -> None:
    minute = load.minutes[number]
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{api.pid}/status").read_text().splitlines())
    memory = int(fields["VmRSS"].split()[0]) / 1024
    median = statistics.median(minute.seconds) * 1000
    streams = load.open_streams - load.stream_failures.total()
    numbers = f"{len(minute.seconds):>9} {median:>10.0f} {_p99(minute.seconds) * 1000:>8.0f}"
    print(f"{number + 1:>6} {numbers} {minute.failures.total():>7} {streams:>8} {memory:>8.0f}", flush=True)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


if __name__ == "__main__":
    sys.exit(main())
