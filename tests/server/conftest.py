"""A whole data plane on one loop, without processes."""

import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from harness.caches import working
from harness.data_plane import DataPlane, data_plane


@pytest.fixture
def serving(tmp_path) -> Callable:
    """A data plane before upstreams with these URLs and settings, as `working` takes them."""

    @contextlib.asynccontextmanager
    async def make(
        urls: list[str], *, prepare: Callable = lambda _worker: None, **more
    ) -> AsyncIterator[DataPlane]:
        async with working(tmp_path, urls, **more) as worker:
            prepare(worker)
            async with data_plane(worker) as plane:
                yield plane

    return make
