from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from app.api.idempotency import IdempotencyKey, StoredAnswer, idempotent
from app.domain.errors import Conflict
from tests.api.foundation import client_of, make_app


class Refused(Conflict):
    code = "license_key_exists"


class Order(BaseModel):
    item: str


class Created(BaseModel):
    id: int
    item: str


class Keys:
    """Keys of a transaction that commits when the answer is complete."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], StoredAnswer] = {}
        self._reserved: dict[tuple[str, str], str] = {}

    async def begin(self, *, scope: str, key: str, fingerprint: str) -> StoredAnswer | None:
        self._reserved[scope, key] = fingerprint
        return self.answers.get((scope, key))

    async def complete(self, *, scope: str, key: str, status_code: int, body: Mapping[str, Any]) -> None:
        self.answers[scope, key] = StoredAnswer(self._reserved[scope, key], status_code, body)


class Shop:
    def __init__(self) -> None:
        self.created: list[str] = []
        self.app: FastAPI = make_app()
        keys = Keys()

        @self.app.post("/api/v1/orders", status_code=201)
        async def create_order(request: Request, order: Order, key: IdempotencyKey) -> Response:
            async def create() -> Created:
                if order.item == "refused":
                    raise Refused(path="x")
                self.created.append(order.item)
                return Created(id=len(self.created), item=order.item)

            return await idempotent(
                request, keys, key=key, create=create, headers=lambda body: {"Location": f"/api/v1/orders/{body['id']}"}
            )

        @self.app.post("/api/v1/returns", status_code=201)
        async def create_return(request: Request, order: Order, key: IdempotencyKey) -> Response:
            async def create() -> Created:
                self.created.append("return")
                return Created(id=0, item="return")

            return await idempotent(request, keys, key=key, create=create)

    async def post(self, item: str, key: str | None, *, path: str = "/api/v1/orders") -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        async with client_of(self.app) as client:
            return await client.post(path, json={"item": item}, headers=headers)


class TestIdempotent:
    async def test_same_request_is_answered_as_the_first_time(self) -> None:
        shop = Shop()

        first = await shop.post("a", "k1")
        second = await shop.post("a", "k1")

        assert shop.created == ["a"]
        assert (second.status_code, second.json()) == (first.status_code, first.json()) == (201, {"id": 1, "item": "a"})
        assert second.headers["location"] == first.headers["location"] == "/api/v1/orders/1"
        assert "idempotency-replayed" not in first.headers
        assert second.headers["idempotency-replayed"] == "true"

    async def test_without_a_key_every_request_creates(self) -> None:
        shop = Shop()

        await shop.post("a", None)
        await shop.post("a", None)

        assert shop.created == ["a", "a"]

    async def test_returns_422_for_another_request_with_the_same_key(self) -> None:
        shop = Shop()
        await shop.post("a", "k1")

        response = await shop.post("b", "k1")

        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
        assert shop.created == ["a"]

    async def test_key_belongs_to_its_operation(self) -> None:
        shop = Shop()
        await shop.post("a", "k1")

        response = await shop.post("a", "k1", path="/api/v1/returns")

        assert (response.status_code, shop.created) == (201, ["a", "return"])

    async def test_refused_request_may_be_sent_again(self) -> None:
        shop = Shop()
        await shop.post("refused", "k1")

        response = await shop.post("a", "k1")

        assert response.status_code == 201

    @pytest.mark.parametrize("key", ["", "x" * 201, "a b"])
    async def test_returns_422_for_a_bad_key(self, key: str) -> None:
        response = await Shop().post("a", key)

        assert (response.status_code, response.json()["code"]) == (422, "invalid_idempotency_key")
        assert response.json()["errors"][0]["pointer"] == "Idempotency-Key:"
