"""The peer of `benchmarks.http_api`: FastAPI and nothing else, one route that reads and one that takes a body."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI(openapi_url=None)


class Thing(BaseModel):
    """What is sent and what comes back."""

    name: str
    kind: str
    url: str


@app.get("/thing")
async def get_thing() -> Thing:
    """Answer with a constant."""
    return Thing(name="thing", kind="ollama", url="http://127.0.0.1:11434")


@app.post("/thing", status_code=201)
async def create_thing(thing: Thing) -> Thing:
    """Answer with what was sent."""
    return thing
