import httpx
import pytest

from app.api.conditional import InvalidIfMatch, StaleVersion, etag_of, parse_if_match
from app.api.errors import PreconditionRequired
from tests.api.foundation import client_of, make_app


async def put(if_match: str | None) -> httpx.Response:
    headers = {} if if_match is None else {"If-Match": if_match}
    async with client_of(make_app()) as client:
        return await client.put("/api/v1/things/a", json={"name": "a"}, headers=headers)


class TestIfMatch:
    @pytest.mark.parametrize("if_match", ['"3"', "3", 'W/"3"', '"1", "3"', "*", ' "3" '])
    async def test_version_that_was_read_passes(self, if_match: str) -> None:
        response = await put(if_match)

        assert response.status_code == 200
        assert response.headers["etag"] == '"4"'

    async def test_returns_428_if_missing(self) -> None:
        response = await put(None)

        assert (response.status_code, response.json()["code"]) == (428, "precondition_required")

    @pytest.mark.parametrize("if_match", ['"2"', '"33"', '"1", "2"'])
    async def test_returns_412_for_another_version(self, if_match: str) -> None:
        response = await put(if_match)

        assert (response.status_code, response.json()["code"]) == (412, "stale_version")
        assert "now it is 3" in response.json()["detail"]

    @pytest.mark.parametrize("if_match", ['"3', '"a b"', '"3",', "é"])
    async def test_returns_422_for_what_is_no_etag(self, if_match: str) -> None:
        with pytest.raises(InvalidIfMatch):
            parse_if_match(if_match)

    def test_blank_is_missing(self) -> None:
        with pytest.raises(PreconditionRequired):
            parse_if_match(" ")

    def test_round_trip(self) -> None:
        precondition = parse_if_match(etag_of(7))

        assert precondition.version == 7
        precondition.require(7)
        with pytest.raises(StaleVersion):
            precondition.require(8)

    @pytest.mark.parametrize("if_match", ["*", '"1", "2"', '"abc"'])
    def test_has_no_single_version(self, if_match: str) -> None:
        assert parse_if_match(if_match).version is None
