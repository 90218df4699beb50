"""What tests of the control plane in their own process share."""

import aiohttp

from gup.config import Settings


def limited(settings: Settings, **cache) -> Settings:
    """The settings with another `[cache]`."""
    return settings.model_copy(update={"cache": settings.cache.model_copy(update=cache)})


async def ask(browser: aiohttp.ClientSession, world, method: str, path: str, **more):
    """Status and JSON of one answer."""
    async with browser.request(method, world.url + path, **more) as answer:
        return answer.status, await answer.json(content_type=None)


async def get(browser: aiohttp.ClientSession, world, path: str, **more):
    return await ask(browser, world, "GET", path, **more)
