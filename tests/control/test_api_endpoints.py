"""What all endpoints of the API have in common: checked requests, described and documented responses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import ValidationError

from gup.control.api.endpoint import ENDPOINTS, JSON, STATE, Count, Endpoint, Request, document
from gup.control.api.entries import Listing as EntryListing
from gup.control.api.schemas import Entries, Purged, Remedy, Response
from gup.control.api.statistics import Listing as ClientListing
from gup.control.service import make_app


class Named(Request):
    name: str
    limit: Count = 10


class Told(Response):
    text: str
    more: str = ""


async def tell(query: Named) -> Told:
    """Tell it."""
    return Told(text=f"{query.name} {query.limit}")


async def stream(_request: web.Request) -> web.StreamResponse:
    """Go on and on."""
    return web.Response(text="streamed")


ALL = (
    Endpoint("GET", "/named/{name}", tell),
    Endpoint("POST", "/named", tell, takes=JSON, status=202),
    Endpoint("GET", "/stream", stream, media=("text/plain",)),
)


@pytest.fixture
async def client():
    app = web.Application()
    app[STATE] = None
    app.add_routes(endpoint.route() for endpoint in ALL)
    async with TestClient(TestServer(app)) as found:
        yield found


async def test_parts_of_the_path_parameters_and_members_of_a_body_make_one_request(client):
    for answer, status, text in (
        (await client.get("/named/%7BA%7D?limit=3"), 200, "{A} 3"),
        (await client.post("/named", json={"name": "b", "limit": 5}), 202, "b 5"),
    ):
        assert (answer.status, await answer.json()) == (status, {"text": text})


TWICE, NONE = "the parameter {} is given twice", "this request takes no parameter, and 'x' was given"
WRONG = [
    ("GET", "/named/a?name=b", None, 400, TWICE.format("name")),
    ("GET", "/named/a?limit=2&limit=3", None, 400, TWICE.format("limit")),
    ("GET", "/named/a?limit=%2B3", None, 400, "limit: '+3' is not right: must be a whole number"),
    ("GET", "/named/a?limti=3", None, 400, "limti: unknown parameter; did you mean limit?"),
    ("GET", "/stream?x=1", None, 400, NONE),
    ("POST", "/named?x=1", {"name": "a"}, 400, NONE),
    ("POST", "/named", {"limit": 3}, 400, "name: missing"),
    ("POST", "/named", {"name": "a", "limti": 3}, 400, "limti: unknown member; did you mean limit?"),
    ("POST", "/named", [], 400, "the body must be a JSON object"),
    ("POST", "/named", None, 415, "the body must be application/json"),
]


async def test_what_a_request_must_not_state_is_named(client):
    for method, target, body, status, words in WRONG:
        answer = await client.request(method, target, json=body)
        assert (answer.status, words in await answer.text()) == (status, True), await answer.text()


async def test_a_stream_is_not_begun_for_its_head(client):
    assert (await client.head("/stream")).status == 405
    assert (await client.head("/named/a")).status == 200


def test_the_document_is_made_from_what_is_checked_and_returned():
    described = document(ALL).root
    operation = described["paths"]["/named/{name}"]["get"]
    assert [(one["name"], one["in"], one["required"]) for one in operation["parameters"]] == [
        ("name", "path", True),
        ("limit", "query", False),
    ]
    limit = {"default": 10, "maximum": 1000, "minimum": 1, "type": "integer"}
    assert operation["parameters"][1]["schema"] == limit
    assert operation["responses"]["200"]["content"] == {
        JSON: {"schema": {"$ref": "#/components/schemas/Told"}}
    }
    told = described["components"]["schemas"]["Told"]
    assert (told["required"], "additionalProperties" in told) == (["text"], False)
    body = described["paths"]["/named"]["post"]["requestBody"]["content"][JSON]["schema"]
    assert described["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["additionalProperties"] is False
    assert "415" in described["paths"]["/named"]["post"]["responses"]


def test_every_request_is_documented_and_every_response_a_model_or_of_another_type_than_json():
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text().replace("?", "`")
    app = make_app(SimpleNamespace())
    described = document(app[ENDPOINTS]).root["paths"]
    for endpoint in app[ENDPOINTS]:
        assert (JSON in endpoint.media) == (not issubclass(endpoint.returns, web.StreamResponse)), endpoint
    for route in app.router.routes():
        path = route.resource.canonical
        if route.method != "HEAD" and not path.startswith("/assets/"):  # the page's own
            assert (route.method.lower() in described.get(path, ())) == (path != "/"), path
            path = path.replace("{version}/{language}/{stream}/{revision}/{file}", "{key}")
            assert f"`{route.method} {path}`" in text, (route.method, path)


def test_a_response_holds_nothing_that_the_document_does_not_name():
    with pytest.raises(ValidationError, match="surprise"):
        Purged.model_validate({"key": "k", "freed_bytes": 1, "surprise": 2})
    assert Remedy(action="a", text="t").model_dump_json(exclude_unset=True) == '{"action":"a","text":"t"}'


def test_a_cursor_is_read_back_by_the_listing_that_wrote_it_and_by_no_other():
    page = Entries(entries=[], matching=2, cursor=(1.5, "a/b/c/d/e"), complete=True)
    text = page.model_dump(mode="json")["cursor"]
    assert EntryListing.model_validate({"cursor": text}).cursor == (1.5, "a/b/c/d/e")
    with pytest.raises(ValidationError, match="it is not a cursor from an earlier page"):
        ClientListing.model_validate({"cursor": text})
