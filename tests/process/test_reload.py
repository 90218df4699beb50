"""What a reload can change."""

import pytest

from gup.config import Settings
from gup.process.reload import effective


def settings(**changes):
    return Settings.model_validate({"upstream": [{"url": "http://a"}]} | changes)


def test_most_settings_take_effect():
    new = settings(
        wan={"rate": "1MB/s"},
        listen={"idle_timeout": "1s"},
        cache={"max_size": "1GB"},
        upstream=[{"url": "https://b", "name": "a", "priority": 3}],
        log={"level": "debug"},
    )
    assert effective(settings(), new) == (new, [])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"listen": {"address": "::"}}, "listen.address"),
        ({"listen": {"port": 1}}, "listen.port"),
        ({"listen": {"admin_address": "::"}}, "listen.admin_address"),
        ({"listen": {"admin_port": 1}}, "listen.admin_port"),
        ({"listen": {"backlog": 1}}, "listen.backlog"),
        ({"cache": {"directory": "/elsewhere"}}, "cache.directory"),
        ({"workers": {"count": 64}}, "workers.count"),
        ({"upstream": []}, "upstream"),
        ({"upstream": [{"url": "http://a"}, {"url": "http://b"}]}, "upstream"),
    ],
)
def test_what_is_made_once_keeps_its_value(changes, key):
    old = settings()
    found, late = effective(old, settings(**changes, wan={"rate": "5MB/s"}))
    assert late == [key]
    assert found == old.model_copy(update={"wan": found.wan})
    assert found.wan.rate == 5_000_000
