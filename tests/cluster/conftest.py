"""Fixtures of the cluster's tests."""

import pytest
from harness.cluster import Node, Valkey


@pytest.fixture
def valkey(tmp_path):
    engine = Valkey(tmp_path / "valkey")
    yield engine
    engine.kill()


@pytest.fixture
async def cluster(valkey):
    """`await cluster("a", "b")`: nodes that run; what is given by name goes to each."""
    made = []

    async def start(*names, **how):
        nodes = [Node(name, how.pop("port", valkey.port), **how) for name in names]
        made.extend(nodes)
        for node in nodes:
            await node.start()
        return nodes

    yield start
    for node in made:
        await node.die()
