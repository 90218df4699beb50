"""Machines with many cores, and machines where a limit can't be raised."""

import os

import pytest
from harness.clients import address_of
from harness.scripted import Answer, ScriptedUpstream
from harness.service import READY, REPOSITORY, Gup
from harness.trees import zip_of
from harness.waiting import until

PATH = "/content/%7B535CB6A4-441F-4E8A-A897-804CD859100E%7D/260101001/full.zip"
BODY = zip_of("machines", 100_000)

REFUSING = """
import resource


def refused(*_):
    raise PermissionError(1, "Operation not permitted")


resource.getrlimit = lambda _: (1000, 2000)  # a soft limit below the hard one: it would be raised
resource.setrlimit = refused
"""
"""A `sitecustomize` that refuses setrlimit as a sandbox does, or a hard limit above `fs.nr_open`."""


def test_where_the_limit_of_open_files_cannot_be_raised_every_process_lives(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(REFUSING)
    env = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))}
    with ScriptedUpstream() as upstream:
        upstream.answer(PATH, Answer(BODY))
        with Gup(tmp_path / "cache", [upstream.url], env=env) as gup:
            assert gup.get(PATH).body == BODY
            assert gup.metric("gup_worker_restarts_total") == 0
            assert gup.log.count("the limit of open files stays at 1000: setrlimit:") == 1


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [46, 64])
def test_any_number_of_workers_serves(tmp_path, workers):
    """45 of them filled the shared page of an earlier release, and the next died at each start."""
    with ScriptedUpstream() as upstream:
        upstream.answer(PATH, Answer(BODY))
        with Gup(tmp_path / "cache", [upstream.url], workers=workers, start=False) as gup:
            gup.launch()
            found = until(lambda: READY.search(gup.log), "gup's ready line", 240)
            assert found[3] == str(workers)
            gup.data, gup.admin = address_of(found[1]), address_of(found[2])
            assert len(gup.workers()) == workers
            assert {gup.get(PATH).body for _ in range(4 * workers)} == {BODY}
            assert gup.metric("gup_worker_restarts_total") == 0
            assert len(upstream.requests(PATH)) == 1
