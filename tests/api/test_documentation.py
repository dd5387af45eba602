import re
from typing import Any

from app.api.documentation import STATIC
from app.api.routes import system
from tests.api.foundation import client_of, make_app


def document() -> dict[str, Any]:
    app = make_app()
    app.include_router(system.router)
    return app.openapi()


class TestOpenApi:
    def test_operation_ids_are_function_names(self) -> None:
        paths = document()["paths"]

        assert paths["/api/v1/things"]["get"]["operationId"] == "list_things"
        assert paths["/api/v1/license"]["get"]["operationId"] == "get_license"

    def test_every_error_is_a_problem_with_an_example(self) -> None:
        for path, operations in document()["paths"].items():
            for method, operation in operations.items():
                errors = {int(status) for status in operation["responses"] if int(status) >= 400}
                assert {403, 500} <= errors, (path, method)
                for status in errors:
                    content = operation["responses"][str(status)]["content"]["application/problem+json"]
                    assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                    assert content["examples"]

    def test_errors_of_the_route_stand_beside_those_of_the_foundation(self) -> None:
        responses = document()["paths"]["/api/v1/things/{name}"]["put"]["responses"]

        assert {"200", "400", "401", "403", "404", "412", "413", "415", "422", "428", "500", "503"} <= set(responses)

    def test_if_match_is_required_where_its_lack_is_428(self) -> None:
        for operations in document()["paths"].values():
            for operation in operations.values():
                given = [one for one in operation.get("parameters", ()) if one["name"] == "If-Match"]
                assert ("428" in operation["responses"]) == any(one["required"] for one in given)

    def test_nothing_of_fastapis_own_errors_is_left(self) -> None:
        assert "HTTPValidationError" not in str(document())

    def test_all_references_lead_somewhere(self) -> None:
        whole = document()

        for name in set(re.findall(r"#/components/schemas/([^'\"]+)", str(whole))):
            assert name in whole["components"]["schemas"]

    def test_says_that_a_token_may_be_needed(self) -> None:
        assert document()["security"] == [{}, {"token": []}]

    async def test_is_served(self) -> None:
        async with client_of(make_app()) as client:
            response = await client.get("/openapi.json")

        assert response.json()["openapi"].startswith("3.1")


class TestPage:
    async def test_loads_nothing_from_elsewhere(self) -> None:
        async with client_of(make_app()) as client:
            page = await client.get("/docs")
            sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
            parts = [await client.get(f"/{source}") for source in sources if not source.startswith("data:")]

        assert len(parts) == 3
        assert [part.status_code for part in parts] == [200, 200, 200]
        assert "http" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]

    async def test_style_sheet_and_start_name_no_other_host(self) -> None:
        async with client_of(make_app()) as client:
            for name in ("swagger-ui.css", "start.js"):
                text = (await client.get(f"/docs/static/{name}")).text.replace("http://www.w3.org/2000/svg", "")
                assert not re.search(r"https?://|@import", text)

    async def test_browser_is_led_to_it(self) -> None:
        async with client_of(make_app(), follow_redirects=True) as client:
            response = await client.get("/")

        assert response.url.path == "/docs"

    def test_bundles_of_others_come_as_a_package(self) -> None:
        assert [path.name for path in STATIC.iterdir()] == ["start.js"]
