"""`make load`: the demo's management server, a gup before it, each scenario by locust; a report of all."""

import asyncio
import contextlib
import signal
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from gup.cli.shared import SeedFlag, quantity
from gup.demo.content import streams
from gup.demo.manager import Link, Manager
from gup.demo.run import GupEndedError, serving
from gup.units import parse_rate, parse_size
from gup_load.report import PAGE, charts_of, forget_reports, raw_of

LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
MISSED, NOT_STARTED, INTERRUPTED = 1, 3, 130
_ALL_STARTED_SECONDS = 10
_STARTS_PER_SECOND = 100  # locust warns of more
_RUN_SECONDS = 300


class Scenario(StrEnum):
    """As in `scenarios`, which only locust's own process may import."""

    MORNING = "Morning"
    PATCH_DAY = "PatchDay"
    STORM = "Storm"
    ROAMING = "Roaming"
    REVISION = "Revision"


CLIENTS = {
    Scenario.MORNING: 500,
    Scenario.PATCH_DAY: 500,
    Scenario.STORM: 200,
    Scenario.ROAMING: 200,
    Scenario.REVISION: 2000,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. `clients` are of each scenario, None for CLIENTS; `options` are locust's."""

    scenarios: list[Scenario]
    clients: int | None
    workers: int
    processes: int
    wan_rate_bytes_per_second: int
    full_bytes: int
    products: int
    seed: int
    report_folder: Path
    options: list[str]


async def run(plan: Plan) -> int:
    """The exit status: 0, MISSED, or what locust itself ended with."""
    forget_reports(plan.report_folder)
    worst = 0
    with tempfile.TemporaryDirectory(prefix="gup-load-") as name:
        folder = Path(name)
        manager = Manager(
            folder / "manager",
            plan.seed,
            streams(plan.products, plan.full_bytes),
            Link(plan.wan_rate_bytes_per_second),
        )
        await manager.publish()
        async with manager.listening("127.0.0.1", 0) as url:
            serve = [
                *(
                    sys.executable,
                    "-m",
                    "gup",
                    "serve",
                    "--upstream",
                    url,
                    "--cache-dir",
                    str(folder / "cache"),
                ),
                *("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--workers", str(plan.workers)),
            ]
            async with serving(serve, folder) as gup:
                for scenario in plan.scenarios:
                    status = await _locust(
                        plan, scenario, ["--host", gup.url, "--admin", gup.control_url, "--manager", url]
                    )
                    worst = max(worst, status)
    return worst


async def _locust(plan: Plan, scenario: Scenario, where: list[str]) -> int:
    clients = plan.clients or CLIENTS[scenario]
    processes = ["--processes", str(plan.processes)] if plan.processes > 1 else []
    each_second = min(_STARTS_PER_SECOND, max(1, clients / _ALL_STARTED_SECONDS))
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(clients), "--spawn-rate", str(each_second), "--run-time", f"{_RUN_SECONDS}s"),
        *("--loglevel", "WARNING", "--seed", str(plan.seed), "--report-dir", str(plan.report_folder)),
        *("--html", str(charts_of(plan.report_folder, scenario))),
        *("--json-file", str(raw_of(plan.report_folder, scenario).with_suffix(""))),  # instead of tables
        *processes, *where, *plan.options, scenario,
    ]  # fmt: skip
    sys.stderr.write(f"\n{scenario}: {clients} clients\n")
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    try:
        return await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def main(  # noqa: PLR0913 - one parameter an option
    context: typer.Context,
    *,
    scenario: Annotated[list[Scenario] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of each scenario; without it 200 to 2,000, as each is meant."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Worker processes of gup.")] = 2,
    load_processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that make the load.")
    ] = 1,
    wan_rate: Annotated[int, quantity(parse_rate, "RATE", "Of the simulated WAN.", "20MB/s")] = 20_000_000,
    full_size: Annotated[int, quantity(parse_size, "SIZE", "Of a full package.", "4MB")] = 4_000_000,
    products: Annotated[int, typer.Option(min=1, metavar="N", help="Streams of content.")] = 9,
    seed: SeedFlag = 1,
    report_dir: Annotated[
        Path, typer.Option(metavar="DIR", help=f"Where {PAGE} is written; earlier reports there are removed.")
    ] = Path("build/load"),
) -> None:
    """Start the demo's management server and a gup, and run the load tests on them.

    Other options are locust's and those of docs/load.md, such as --max-first-byte 1s. Exit status: 0 when
    every limit was kept, 1 when one was missed, 2 for wrong options, 3 when gup did not start.
    """
    plan = Plan(
        scenario or list(Scenario), clients, workers, load_processes, wan_rate, full_size, products, seed,
        report_dir, context.args,
    )  # fmt: skip
    status = NOT_STARTED
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.get_loop().add_signal_handler(
                signal.SIGTERM, lambda: [task.cancel() for task in asyncio.all_tasks(runner.get_loop())]
            )
            status = runner.run(run(plan))
    except* GupEndedError as group:
        sys.stderr.writelines(f"load test: {error}\n" for error in group.exceptions)
    except* (KeyboardInterrupt, asyncio.CancelledError):
        status = INTERRUPTED
    raise typer.Exit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
