"""A simulated management server in the test's own loop, small and fast."""

import aiohttp
import pytest

from gup.demo import content
from gup.demo.content import Shelf
from gup.demo.manager import Link, Listening, Site


@pytest.fixture
def shelf(tmp_path):
    directory = tmp_path / "shelf"
    directory.mkdir()
    return Shelf(directory, 1, content.streams(4, 60_000))


@pytest.fixture
async def site(shelf):
    site = Site(shelf, Link(0))
    await site.publish(len(shelf.streams))
    return site


@pytest.fixture
async def manager_url(site):
    async with Listening(site, "127.0.0.1:0") as listening:
        yield listening.url


@pytest.fixture
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session
