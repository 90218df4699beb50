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
        ({"listen": {"admin_address": "::1"}}, "listen.admin_address"),
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


def test_tokens_and_certificates_change_but_not_whether_they_are_needed():
    token, other = {"admin_token_file": "/token"}, {"admin_token_file": "/other"}
    beyond = settings(listen={"admin_address": "::"} | token)
    new = settings(listen={"admin_address": "::"} | other)
    assert effective(beyond, new) == (new, [])
    assert effective(beyond, settings()) == (
        beyond,
        ["listen.admin_address", "listen.admin_token_file"],
    )
    tls = {"admin_cert_file": "/cert", "admin_key_file": "/key"}
    assert effective(settings(listen=tls), settings()) == (settings(listen=tls), ["listen.admin_cert_file"])
    assert effective(settings(), settings(listen=tls)) == (settings(), ["listen.admin_cert_file"])
    renewed = settings(listen=tls | {"admin_cert_file": "/cert2"})
    assert effective(settings(listen=tls), renewed) == (renewed, [])
