"""How large a disk: the curve from the recorded demand, beside real services of other sizes."""

import contextlib
import csv
import io
import json
import time

import pytest
from harness.commands import command, on, run
from harness.demand import PATTERNS, SizedUpstream, body_of, delta_of, full_of
from harness.processes import until
from harness.service import Gup, toml

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
    some = [full_of(n) for n in range(200) if 200_000 < len(body_of(full_of(n), 200_000)) < 300_000][:6]
    paths = [path for path in [*some, *some[:2]] for _ in range(2)]  # four fit
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", MB, mean_bytes=200_000)
        fetched = drive(gup, upstream, paths)
        answer = counted(gup, len(paths))
        assert gup.metric("gup_evictions_total") >= 3
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


PATCHES = "{0000000A-0000-4000-8000-000000000000}"


@contextlib.contextmanager
def with_patches(tmp_path):
    """A service with a client patch that one client got and another was refused; other settings for it."""
    catalogue = tmp_path / "ContentInfo.txt"
    catalogue.write_text(f"{PATCHES}: SEPC Client Patch Win64 14.3 RU2 - Patch - English\r\n")
    read = {"catalog": {"file": str(catalogue)}}
    with contextlib.ExitStack() as stack:
        gup, upstream = serve_sized(stack, tmp_path / "a", 5 * MB, **read)
        drive(gup, upstream, [full_of(stream) for stream in range(1, 9)] * 2)
        for address, version, status in (("127.0.0.2", "14.3 RU2", 200), ("127.0.0.3", "14.2", 403)):
            patch = f"/content/{PATCHES}/260101001/full.zip"
            client = gup.connect(source=address)
            assert client.get(patch, {"GUP-Client-Version": version}).status == status
        counted(gup, 17)
        # what was sent to whom is told a second after it was asked for
        until(lambda: gup.api("/api/v1/clients")[1]["matching"] == 3, "the three clients are known")
        tables = {
            "cache": {"max_size": MB},
            "wan": {"rate": "20kB/s"},
            "fill": {"queue_timeout": "1s"},
            **read,
        }
        yield gup, tables | {"upstream": [{"url": upstream.url, "headers": {"X-Key": "hush"}}]}


def test_settings_are_tried_before_they_are_set(tmp_path):
    """Another size, rate and rules; who would be refused, and who no longer."""
    with with_patches(tmp_path) as (gup, tables):
        given = {**tables, "rules": {"download_client_patches": False}}
        status, answer = gup.api("/api/v1/try", "POST", given={"settings": given})
        assert (status, answer["problems"]) == (200, [])
        everything = answer["present"]["wan_bytes"]
        assert everything == answer["received_bytes"]
        assert answer["tried"]["wan_bytes"] >= everything
        assert answer["tried"]["longest_wait_seconds"] > 1
        assert answer["tried"]["late_fetches"] > 0
        assert {"cache.max_size", "wan.rate", "rules.download_client_patches"} <= set(answer["changed"])
        by_rule = {row["rule"]: row for row in answer["refusals"]}
        assert set(by_rule) == {"client_patches_off", "version"}
        row = by_rule["client_patches_off"]
        assert (row["enforced"], row["clients"], row["requests"], row["present_clients"]) == (True, 2, 2, 0)
        assert {client["address"] for client in row["some_clients"]} == {"127.0.0.2", "127.0.0.3"}
        assert (by_rule["version"]["clients"], by_rule["version"]["present_clients"]) == (0, 1)
        assert (answer["newly_refused_clients"], answer["no_longer_refused_clients"]) == (1, 0)
        status, told = gup.api("/api/v1/try", "POST", given={"settings": "[wan]\nrate = 'fast'\n"})
        assert (status, told["tried"], len(told["problems"])) == (200, None, 1)
        assert gup.api("/api/v1/try", "POST", given={"settings": {}, "days": 0})[0] == 400


@pytest.mark.long
def test_the_command_that_tries_settings(tmp_path):
    """Wrong ones are told as `gup config check` tells them; no secret leaves the file."""
    with with_patches(tmp_path) as (gup, tables):
        file = tmp_path / "other.toml"
        own = {"cache": tables["cache"] | {"directory": str(gup.cache_dir)}, "rules": {"mode": "off"}}
        file.write_text(toml({**tables, **own}))
        answer = json.loads(on(gup, "config", "try", file, "--json").stdout)
        assert (answer["newly_refused_clients"], answer["no_longer_refused_clients"]) == (0, 1)
        file.write_text(toml({**tables, **own, "rules": {"download_client_patches": False}}))
        shown = on(gup, "config", "try", file).stdout
        assert "The rule client_patches_off would refuse 2 clients (2 requests)" in shown
        assert "as it really was" in shown
        file.write_text("[wan]\nrate = 'fast'\n")
        wrong, checked = on(gup, "config", "try", file), command("config", "check", file)
        assert wrong.returncode == checked.returncode == 2
        assert wrong.stderr == checked.stderr
        assert not any(b"hush" in path.read_bytes() for path in gup.cache_dir.rglob("*") if path.is_file())


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
