"""What tests of the control plane in their own process share."""

import aiohttp

from gup.config import Settings


def limited(settings: Settings, **cache) -> Settings:
    """The settings with another `[cache]`."""
    return settings.model_copy(update={"cache": settings.cache.model_copy(update=cache)})


async def get(browser: aiohttp.ClientSession, world, path: str, **more):
    """Status and JSON of one answer."""
    async with browser.get(world.url + path, **more) as answer:
        return answer.status, await answer.json(content_type=None)
