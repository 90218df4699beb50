"""The API's description against a real service with content: generated requests, right and wrong ones."""

import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from harness.content import CONTENT_INFO, DELTA, INDEX, content_path, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, Gate
from hypothesis import HealthCheck, Phase, given, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.generation import GenerationMode

schemathesis.serializer.alias("application/x-tar", "application/octet-stream")
EXAMPLES = 12
OPAQUE = {"cursor", "upstream", "moniker", "of", "client", "at", "month"}
FREE = ("/api/v1/import", "/api/v1/prefetch")
"""No schema tells which cursors were given out, which names there are, what an archive or a path is."""
ENDLESS = ("/api/v1/events",)
"""Answers that never end."""
PURGES = ("delete", "/api/v1/content")
"""What may remove every entry comes last. One of its parameters must be there, which no schema tells."""


@pytest.fixture
def gup(serve) -> Iterator[Gup]:
    """A service with a few entries, and one that is being fetched for as long as the test runs."""
    full, slow, gate = content_path("full.zip"), content_path("slow.zip"), Gate()
    held = Answer(zip_of("slow", 300_000), gates=((100_000, gate),))
    answers = {INDEX: Answer(CONTENT_INFO), full: zip_of("full", 20_000), DELTA: b"delta" * 1000, slow: held}
    # no connection of upstream's comes or goes while the test runs: it looks for what it left behind
    service, _ = serve(answers, workers=1, each={"health_interval": "0s", "read_timeout": "5m"})
    assert [service.get(path).status for path in (full, DELTA)] == [200, 200]
    service.connect().ask(quote(slow))
    until(lambda: service.metric("gup_cache_entries") >= 2, "the entries are known")
    until(lambda: service.status()["fills"], "one is being fetched")
    yield service
    gate.open()


def strict(node: Any) -> Any:
    """The same description, but answers may hold nothing that it does not name."""
    if isinstance(node, dict):
        changed = {name: strict(value) for name, value in node.items()}
        if node.get("type") == "object" and "properties" in node:
            changed.setdefault("additionalProperties", False)
        return changed
    return [strict(item) for item in node] if isinstance(node, list) else node


@pytest.fixture
def schema(gup: Gup) -> Any:
    status, document = gup.api("/api/v1/openapi.json")
    assert status == 200
    loaded = schemathesis.openapi.from_dict(strict(document))
    loaded.config.update(base_url=gup.admin_url, headers={})
    loaded.config.generation.update(modes=list(GenerationMode))
    return loaded


def test_every_request_is_answered_as_described(gup: Gup, schema: Any) -> None:
    asked = 0
    acceptance = schemathesis.checks.CHECKS.get_one("positive_data_acceptance")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations.sort(key=lambda operation: (operation.method, operation.path) == PURGES)
    for operation in operations:
        if operation.path in ENDLESS:
            continue
        if operation is operations[-1]:
            _check_entry(gup, schema)

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            free = (case.method.lower(), case.path) == PURGES or case.path in FREE
            unknown = [acceptance] if free or OPAQUE & set(case.query or {}) else []
            case.call_and_validate(headers={"Authorization": f"Bearer {gup.token}"}, excluded_checks=unknown)

        ask()
    assert asked > 100


def _check_entry(gup: Gup, schema: Any) -> None:
    """Generated names hit no entry; these do."""
    path = "/api/v1/content/{version}/{language}/{stream}/{revision}/{file}"
    (key,) = (key for key in gup.bodies() if key.endswith("full.zip"))
    parts = dict(zip(("version", "language", "stream", "revision", "file"), key.split("/"), strict=True))
    for at, method in ((path, "GET"), (f"{path}/pin", "PUT"), (f"{path}/pin", "DELETE"), (path, "DELETE")):
        case = schema[at][method].Case(path_parameters=parts)
        answer = case.call_and_validate(headers={"Authorization": f"Bearer {gup.token}"})
        assert answer.status_code == 200, (method, at)
