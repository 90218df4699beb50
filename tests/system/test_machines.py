"""Machines with many cores, and machines where a limit can't be raised."""

import os

import pytest
from harness.clients import address_of
from harness.content import BIG, zip_of
from harness.processes import until
from harness.service import READY, REPOSITORY

BODY = zip_of("machines", 100_000)
REFUSING = """
import resource


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


resource.getrlimit = lambda _: (1000, 2000)  # a soft limit below the hard one: it would be raised
resource.setrlimit = refused
"""
"""A `sitecustomize` that refuses setrlimit as a sandbox does, or a hard limit above `fs.nr_open`."""


def test_where_the_limit_of_open_files_cannot_be_raised_every_process_lives(serve, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    env = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY)))}
    gup, _ = serve({BIG: BODY}, env=env)
    gup.serves(BIG, BODY)
    assert gup.metric("gup_worker_restarts_total") == 0
    assert gup.log.count("the limit of open files stays at 1000: setrlimit:") == 1


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_any_number_of_workers_serves(serve):
    """45 of them filled the shared page of an earlier release, and the next died at each start."""
    gup, upstream = serve({BIG: BODY}, workers=64, start=False)
    gup.launch()
    found = until(lambda: READY.search(gup.log), "gup's ready line", 240)
    assert found[3] == "64"
    gup.data, gup.admin = address_of(found[1]), address_of(found[2])
    assert len(gup.workers()) == 64
    assert {gup.get(BIG).body for _ in range(4 * 64)} == {BODY}
    assert gup.metric("gup_worker_restarts_total") == 0
    assert len(upstream.requests(BIG)) == 1
