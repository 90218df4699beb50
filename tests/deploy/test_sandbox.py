"""What the unit and the image take away, taken away from a real gup: it fetches, stores and serves on."""

import re
import signal
import sys
from pathlib import Path

import pytest
from harness.content import DELTA, make_tree
from harness.needs import program
from harness.service import Gup
from harness.upstreams import Nginx

# As ProtectSystem=strict with StateDirectory=, and `read_only` with a volume: the first word stays writable.
CONFINE = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -o remount,bind,ro /
shift
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


@pytest.mark.needs("nginx", "sandbox")
def test_gup_needs_no_capability_and_writes_to_its_cache_only(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    unshare = [program("unshare"), "--mount", "sh", "-c", CONFINE, "sh", str(cache)]

    class Confined(Gup):
        PROGRAM = (*unshare, sys.executable, "-B", "-m", "gup")

    tree = make_tree(tmp_path / "tree", 100_000)
    command = ["/bin/sh", "-c", f"id -u > {cache}/told; cat >> {cache}/told; touch /etc/x || true"]
    settings = {"alarms": {"command": command}}
    with (
        Nginx(tree, tmp_path / "nginx") as upstream,
        Confined(cache, [upstream.url], settings=settings) as gup,
    ):
        for pid in gup.pids:
            seen = Path(f"/proc/{pid}")
            assert re.search(r" / / ro[ ,]", (seen / "mountinfo").read_text())
            assert re.search(r"^CapBnd:\t0+$", (seen / "status").read_text(), re.MULTILINE)
        for _ in range(2):
            assert gup.get(DELTA).body == tree.body(DELTA)
        gup.wait_stored(DELTA.rpartition("/")[2])
        before = gup.status()
        gup.signal(signal.SIGUSR2)  # another program takes over
        gup.wait_replaced(before, 2)
        assert gup.get(DELTA).body == tree.body(DELTA)
        (sent,) = gup.api("/api/v1/alarms/test", "POST")[1]["sent"]
        assert sent["accepted"], "an alarm command is as confined, and runs"
        assert "Read-only file system" in sent["detail"]
        assert '"alarm": "test"' in (cache / "told").read_text()
        assert gup.stop() == 0
        assert "Read-only file system" not in gup.log
