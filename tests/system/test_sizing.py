"""How large a disk: the curve from the recorded demand, beside real services of other sizes."""

import contextlib
import csv
import io
import json
import time

import pytest
from harness.commands import run
from harness.demand import PATTERNS, SizedUpstream, body_of, delta_of, full_of
from harness.processes import until
from harness.service import Gup

MB = 10**6
QUIET = {"access": "off", "level": "warning"}


def serve_sized(stack, folder, size, *, mean_bytes=20_000, workers=1, **settings):
    upstream = stack.enter_context(SizedUpstream(mean_bytes))
    settings = {"cache": {"max_size": size, "min_free": 0}, "log": QUIET, **settings}
    return stack.enter_context(Gup(folder, [upstream.url], workers=workers, settings=settings)), upstream


def drive(gup, upstream, paths, *, per_second=0.0) -> int:
    """Request them one after the other; the body bytes that upstream has sent for it."""
    client, began = gup.connect(), time.monotonic()
    for number, path in enumerate(paths):
        if per_second:
            time.sleep(max(0.0, began + number / per_second - time.monotonic()))
        assert client.get(path).status == 200
    return sum(request.body_bytes for request in upstream.requests())


def counted(gup, requests) -> dict:
    """The curve when all requests are in it: workers tell of them once a second."""

    def found():
        status, answer = gup.api("/api/v1/sizing")
        assert status == 200, answer
        return answer if answer["requests"] >= requests else None

    return until(found, "all requests are recorded", 20)


def wan_bytes(gup, size) -> int:
    """What the command says of one size."""
    answer = json.loads(
        run("report", "sizing", "--size", str(size), "--json", "--admin", gup.admin_url).stdout
    )
    (point,) = (point for point in answer["points"] if point["size_bytes"] == size)
    return point["wan_bytes"]


def test_the_curve_is_what_a_service_of_that_size_fetches(tmp_path):
    """In small: its own size, with evictions. The long form compares others with services of theirs."""
    paths = list(PATTERNS["aging"](1, 100))
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", 1_600_000)
        fetched = drive(gup, upstream, paths)
        answer = counted(gup, len(paths))
        assert gup.metric("gup_evictions_total") > 0
        assert answer["received_bytes"] == fetched
        (own,) = (point for point in answer["points"] if point["factor"] == 1)
        assert own["wan_bytes"] == pytest.approx(fetched, rel=0.02)


def test_api_command_and_metrics(tmp_path):
    fulls = [full_of(stream) for stream in range(1, 9)]
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", MB)
        assert gup.api("/api/v1/sizing")[1]["saying"] == ["Nothing was requested yet."]
        for wrong in (
            "sizes=much",
            "sizes=-1MB",
            "sizes=1MB,",
            "sizes=" + ",".join(["1MB"] * 13),
            "days=0",
            "size=1GB",
        ):
            assert gup.api(f"/api/v1/sizing?{wrong}")[0] == 400, wrong
        drive(gup, upstream, fulls * 3)
        answer = counted(gup, 24)
        everything = sum(len(body_of(path, 20_000)) for path in fulls)
        assert answer["everything_bytes"] == everything
        assert {point["wan_bytes"] for point in answer["points"] if point["factor"] >= 1} == {everything}
        assert answer["saying"][0].startswith("A larger store would have saved nothing more in the last ")
        table = run("report", "sizing", "--csv", "--admin", gup.admin_url).stdout
        rows = list(csv.DictReader(io.StringIO(table)))
        assert [row["factor"] for row in rows][:4] == ["0.25", "0.5", "0.75", "1.0"]
        assert "over the WAN" in run("report", "sizing", "--admin", gup.admin_url).stdout
        until(lambda: "gup_sizing_wan_bytes{" in gup.metrics().text, "the curve is in the metrics")
        assert gup.metric("gup_sizing_wan_bytes", factor="2") == everything


@pytest.mark.long
def test_the_record_outlives_a_crash_and_ends_with_its_setting(tmp_path):
    fulls = [full_of(stream) for stream in range(1, 9)]
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", MB)
        drive(gup, upstream, fulls * 3)
        answer = counted(gup, 24)
        gup.kill()  # what the API has told is on disk
        gup.start()
        assert counted(gup, 24)["points"] == answer["points"]
        drive(gup, upstream, [delta_of(1, 1, 2)])
        assert counted(gup, 25)["everything_bytes"] > answer["everything_bytes"]
        gup.reload(reports={"demand": 0}, cache={"max_size": MB, "min_free": 0})
        until(lambda: not list((gup.cache_dir / "reports" / "demand").iterdir()), "the record is removed", 30)
        assert gup.api("/api/v1/sizing")[1]["saying"] == ["Nothing is recorded: reports.demand is 0."]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sizes_within_two_percent_of_real_services(tmp_path, pattern, seed, figures):
    """One service records; what it says of half and twice its size is what services of these fetch."""
    paths = list(PATTERNS[pattern](seed, 900))
    size = {"aging": 2 * MB, "zipf": 4 * MB, "scanned": 5 * MB}[pattern]
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", size)
        drive(gup, upstream, paths, per_second=60)
        counted(gup, len(paths))
        for other in (size // 2, 2 * size):
            with contextlib.ExitStack() as own:
                service, behind = serve_sized(own, tmp_path / str(other), other)
                really, said = drive(service, behind, paths, per_second=60), wan_bytes(gup, other)
                figures(
                    f"{pattern} {seed}: {other} bytes: said {said}, really {really}: {said / really - 1:+.2%}"
                )
                assert said == pytest.approx(really, rel=0.02)
