"""Submits jobs over HTTP, each with its key, and writes an id down only once it was accepted.

    python -m tests.chaos.submitter ROOT PORT JOBS AHEAD

It may be killed at any time; the next one begins behind the last id that was written down, and repeats with the same
key what was perhaps accepted.
"""

import os
import random
import sys
import time
from pathlib import Path

import httpx

from tests.chaos.stage import submission

FAMILIES = ("none", "none", "none", "plain", "session", "orphan", "stubborn")
LIVING = ("queued", "launching", "running", "stopping")


def main(root: Path, port: int, jobs: int, ahead: int) -> None:
    """Submit until there are `jobs`, with at most `ahead` under way."""
    written = os.open(root / "acknowledged", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    number = (root / "acknowledged").read_bytes().count(b"\n")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60, trust_env=False) as client:
        while number < jobs and not (root / "enough").exists():
            try:
                if under_way(client) >= ahead:
                    time.sleep(0.3)
                    continue
                job = submit(client, number)
            except httpx.HTTPError:
                time.sleep(0.1)
                continue
            if job is not None:
                os.write(written, f"{job}\n".encode())
                number += 1
            else:
                time.sleep(0.1)


def under_way(client: httpx.Client) -> int:
    answer = client.get("/jobs", params={"status": LIVING, "limit": 100})
    return len(answer.raise_for_status().json()["items"])


def submit(client: httpx.Client, number: int) -> str | None:
    """Return the id of job `number`, or None when the service is busy with its database."""
    choice = random.Random(number)
    parameters = {"ticks": choice.randint(6, 24), "family": choice.choice(FAMILIES)}
    answer = client.post("/jobs", json=submission(parameters), headers={"Idempotency-Key": f"chaos-{number}"})
    if answer.status_code >= 500:
        return None
    assert answer.status_code == 201, answer.text
    job_id: str = answer.json()["id"]
    return job_id


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
