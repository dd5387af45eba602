from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Response
from pydantic import BaseModel

from app.api.idempotency import CreationDep
from app.domain.errors import Conflict
from app.store.session import Database
from tests.api.foundation import client_of, make_app


class Refused(Conflict):
    code = "license_key_exists"


class Order(BaseModel):
    item: str


class Created(BaseModel):
    id: int
    item: str


class Shop:
    def __init__(self, database: Database) -> None:
        self.created: list[str] = []
        self.app: FastAPI = make_app()
        self.app.state.services = SimpleNamespace(database=database)

        @self.app.post("/api/v1/orders", status_code=201)
        async def create_order(order: Order, creation: CreationDep) -> Response:
            async def create() -> Created:
                if order.item == "refused":
                    raise Refused(path="x")
                self.created.append(order.item)
                return Created(id=len(self.created), item=order.item)

            return await creation.answer(create, headers=lambda body: {"Location": f"/api/v1/orders/{body['id']}"})

        @self.app.post("/api/v1/returns", status_code=201)
        async def create_return(order: Order, creation: CreationDep) -> Response:
            async def create() -> Created:
                self.created.append("return")
                return Created(id=0, item="return")

            return await creation.answer(create, headers=lambda _: {})

    async def post(self, item: str, key: str | None, *, path: str = "/api/v1/orders") -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        async with client_of(self.app) as client:
            return await client.post(path, json={"item": item}, headers=headers)


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database)


class TestIdempotent:
    async def test_same_request_is_answered_as_the_first_time(self, shop: Shop) -> None:
        first = await shop.post("a", "k1")
        second = await shop.post("a", "k1")

        assert shop.created == ["a"]
        assert (second.status_code, second.json()) == (first.status_code, first.json()) == (201, {"id": 1, "item": "a"})
        assert second.headers["location"] == first.headers["location"] == "/api/v1/orders/1"
        assert "idempotency-replayed" not in first.headers
        assert second.headers["idempotency-replayed"] == "true"

    async def test_without_a_key_every_request_creates(self, shop: Shop) -> None:
        await shop.post("a", None)
        await shop.post("a", None)

        assert shop.created == ["a", "a"]

    async def test_returns_422_for_another_request_with_the_same_key(self, shop: Shop) -> None:
        await shop.post("a", "k1")

        response = await shop.post("b", "k1")

        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
        assert shop.created == ["a"]

    async def test_key_belongs_to_its_operation(self, shop: Shop) -> None:
        await shop.post("a", "k1")

        response = await shop.post("a", "k1", path="/api/v1/returns")

        assert (response.status_code, shop.created) == (201, ["a", "return"])

    async def test_refused_request_may_be_sent_again(self, shop: Shop) -> None:
        await shop.post("refused", "k1")

        response = await shop.post("a", "k1")

        assert response.status_code == 201

    @pytest.mark.parametrize("key", ["", "x" * 201, "a b"])
    async def test_returns_422_for_a_bad_key(self, shop: Shop, key: str) -> None:
        response = await shop.post("a", key)

        assert (response.status_code, response.json()["code"]) == (422, "invalid_idempotency_key")
        assert response.json()["errors"][0]["pointer"] == "Idempotency-Key:"
