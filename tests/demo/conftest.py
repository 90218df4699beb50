"""A simulated management server in the test's own loop, small and fast."""

import aiohttp
import pytest

from gup.demo import content
from gup.demo.manager import Link, Manager


@pytest.fixture
async def manager(tmp_path):
    manager = Manager(tmp_path / "manager", 1, content.streams(4, 60_000), Link(0))
    await manager.publish()
    return manager


@pytest.fixture
async def manager_url(manager):
    async with manager.listening("127.0.0.1", 0) as url:
        yield url


@pytest.fixture
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session
