"""An environment without gup's own variables, and stand-ins for the parts that do the work."""

import pytest


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("GUP_CONFIG", "GUP_ADMIN", "GUP_TOKEN_FILE", "GUP_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def called(monkeypatch):
    """Stands in for the parts that do the work: `called("module.function")` gives the calls."""

    def stand_in(function, answer=0):
        calls = []

        def recorded(*positional, **named):
            calls.append((positional, named))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(function, recorded)
        return calls

    return stand_in
