"""Random requests to a running service, by every role, and in another project: `make fuzz-api EXAMPLES=n` a route.

Schemathesis makes them from the OpenAPI document: valid and invalid ones, and chains that use what earlier answers
named. No answer may be a server error, have a form that the document does not describe, or show something of another
project. In `default` stand a data set, a method, a script, a secret and jobs with a mark; callers of `bikes` look for
it. Full reports stand in `--reports`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.service import api_process

TOKEN: Final = "the-token-of-the-fuzzed-service"
MARK: Final = "F0RE1GN-5c1d"
API: Final = "/api/v1"
CHECKS: Final = (
    "no_internal_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
)  # fmt: skip
STREAMS: Final = "stream_job_events"
"""An answer that ends with its job."""
ENDS_ITSELF: Final = ("rotate_key", "revoke_key")
"""What takes its own key from a caller that may."""


@dataclass(frozen=True)
class Caller:
    """Who sends requests, where to, and whether what is marked is another's."""

    name: str
    secret: str
    base: str
    foreign: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20, help="most requests for each route, caller and phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reports", type=Path, default=Path(".cache/fuzz-api"))
    parser.add_argument("--callers", default="", help="part of the names of the only callers to try")
    options = parser.parse_args()
    failed, total = False, 0
    variables = {"DEEPE_API_TOKEN": TOKEN, "DEEPE_WEBHOOK_ADDRESSES": "public", "DEEPE_TARGET_ADDRESSES": "public"}
    options.reports.mkdir(parents=True, exist_ok=True)
    with api_process(licensed=True, **variables) as api:
        url = f"http://127.0.0.1:{api.port}"
        print(f"{'caller':34} {'requests':>9} {'seconds':>8}  outcome", flush=True)
        for caller in _callers(url, api.home):
            if options.callers not in caller.name:
                continue
            cases, seconds, problems = _fuzz(url, caller, options)
            total += cases
            failed = failed or bool(problems)
            print(f"{caller.name:34} {cases:>9} {seconds:>8}  {problems or 'no failure'}", flush=True)
    print(f"{total} requests")
    return int(failed)


def _callers(url: str, home: Path) -> list[Caller]:
    """Make the projects, what is marked and a key for each role; return who is to call."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        _made(http.post(f"{API}/projects", json={"id": "bikes"}))
        _furnish(http, home)
        there = f"/projects/bikes{API}"
        keys = {role: _made(http.post(f"{there}/keys", json={"name": role, "role": role})) for role in _ROLES}
        outside = _made(http.post(f"{API}/keys", json={"name": "outside", "role": "developer"}))
    found = [Caller(f"{role} of bikes", keys[role]["secret"], "", foreign=True) for role in _ROLES]
    found += [Caller("admin of bikes, in default", keys["admin"]["secret"], "/projects/default", foreign=True)]
    found += [Caller("developer of default, in bikes", outside["secret"], "/projects/bikes", foreign=True)]
    return [*found, Caller("nobody", "wrong", "", foreign=True), Caller("administrator", TOKEN, "", foreign=False)]


_ROLES: Final = ("viewer", "operator", "developer", "admin")


def _furnish(http: httpx.Client, home: Path) -> None:
    rows = {"messages": [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]}
    jsonl = {"Content-Type": "application/jsonl", "If-None-Match": "*"}
    _made(http.put(f"{API}/datasets/{MARK}/file", content=json.dumps(rows) + "\n", headers=jsonl))
    python = {"Content-Type": "text/x-python", "If-None-Match": "*"}
    _made(http.put(f"{API}/scripts/{MARK}.py", content=f"print('{MARK}')", headers=python))
    _made(http.put(f"{API}/secrets/{MARK}", json={"value": f"{MARK}-value"}, headers={"If-Match": "*"}))
    method = _made(http.get(f"{API}/methods/Custom01"))
    _made(http.post(f"{API}/methods", json={**method, "name": MARK}))
    job = {"method": MARK, "base_model": "custom01-base", "dataset": MARK, "through": "complete", "name": MARK}
    _made(http.post(f"{API}/jobs", json={**job, "wait": True}))
    hook = {"url": f"https://example.com/{MARK}", "events": ["job.failed"]}
    _made(http.post(f"{API}/webhooks", json=hook))
    (home / "images" / f"{MARK}.png").write_bytes(b"\x89PNG\r\n\x1a\n")


def _made(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise RuntimeError(f"{response.request.method} {response.request.url}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


def _fuzz(url: str, caller: Caller, options: argparse.Namespace) -> tuple[int, str, str]:
    """Return how many requests were sent, how long it took, and what failed."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--url", url + caller.base),
        *("--header", f"Authorization: Bearer {caller.secret}"),
        *("--checks", ",".join([*CHECKS, *(["nothing_foreign"] if caller.foreign else [])])),
        *("--phases", "coverage,fuzzing,stateful", "--continue-on-failure", "--workers", str(options.workers)),
        *("--max-examples", str(options.examples), "--seed", str(options.seed), "--generation-database", "none"),
        *("--suppress-health-check", "all", "--request-timeout", "60", "--warnings", "off", "--no-shrink"),
        *(part for name in (STREAMS, *ENDS_ITSELF) for part in ("--exclude-operation-id", name)),
    ]
    log = options.reports / f"{re.sub('[^a-z]+', '-', caller.name)}.log"
    with log.open("w") as output:
        subprocess.run(command, env=_environment(), stdout=output, stderr=subprocess.STDOUT, check=False)
    told = log.read_text("utf-8")
    cases = [int(found) for found in re.findall(r"([\d,]+) generated", told.replace(",", ""))]
    seconds = re.findall(r"in ([\d.]+s)", told)
    failures = re.findall(r"^  ❌ (ST\d+ [^\n]+)$", told, re.MULTILINE)
    if not cases or "nothing to test" in told:
        failures.append("Schemathesis did not run")
    return sum(cases), seconds[-1] if seconds else "-", "; ".join(failures)


def _environment() -> Mapping[str, str]:
    return {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.api_hooks", "DEEPE_FUZZ_MARK": MARK}


if __name__ == "__main__":
    sys.exit(main())
