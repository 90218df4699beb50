"""What an upstream is asked: whatever the path, never another host."""

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from gup import config
from gup.upstream.connection import Upstream
from gup.upstream.exchange import UpstreamFailure


@pytest.mark.parametrize(
    "path",
    ["", "@evil.example:80/x", ":81/x", ".evil.example/x", "evil", "/x\r\nHost: y", "/x y", "/é", "//\0"],
)
@pytest.mark.parametrize("url", ["http://manager:8014", "https://manager", "https://[fd00::1]:8443/sepm"])
async def test_no_path_changes_the_host_that_is_asked(pool_of, url, path):
    async with pool_of({"name": "a", "url": url}) as pool:
        with pytest.raises(UpstreamFailure, match="is no path"):
            pool.upstreams[0].url(path)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
def test_whatever_follows_a_slash_the_authority_stays(rest):
    """As aiohttp reads the URL; without what `yarl` refuses to read at all."""
    upstream = Upstream(config.Upstream.model_validate({"url": "http://manager:8014"}), "gup", "1.1 a")
    asked = yarl.URL(upstream.url(f"/{rest}"), encoded=True)
    assert (asked.scheme, asked.host, asked.port, asked.user) == ("http", "manager", 8014, None)
