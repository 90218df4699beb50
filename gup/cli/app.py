"""The command line: the commands that run something. What is heavy is imported by the command it serves."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gup
from gup.cli import flags, operate, prefetch, report, rules, settings
from gup.cli.complaining import complaining
from gup.cli.options import ConfigFlag, JsonFlag, SeedFlag, duration, rate, size

if TYPE_CHECKING:
    from gup.config import Settings

app = typer.Typer(
    help="A Group Update Provider: fetches content over the WAN once, serves it to the whole site.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
simulate = typer.Typer(
    help="Play one side of a site: the management server, or the clients.", no_args_is_help=True
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gup {gup.__version__}")
        raise typer.Exit


@app.callback()
def _gup(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version  # its callback has done the work


def _servable(config: Path | None, given: dict[str, Any]) -> "Settings":
    from gup.cli.usable import require_usable
    from gup.config import load, require_servable

    loaded = load(config, flags=given)
    require_servable(loaded)
    require_usable(loaded)
    return loaded


@app.command()
def serve(
    *,
    config: ConfigFlag = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A server to fetch from; may be repeated; replaces all others."),
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where clients connect.")] = None,
    admin: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The control plane's address.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="The cache directory.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes; 0 is one a core.")
    ] = None,
) -> None:
    """Run the service until SIGTERM or SIGINT; SIGHUP reads the settings again."""
    with complaining():
        given = flags.serve_flags(
            upstream=upstream or [], listen=listen, admin=admin, cache_dir=cache_dir, workers=workers
        )
        read = functools.partial(_servable, config, given)
        first = read()
        from gup.process.supervisor import serve as supervise

        status = supervise(first, reload=read)
    raise typer.Exit(status)


@app.command()
def demo(
    *,
    clients: Annotated[int, typer.Option(min=1, help="Simulated clients.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="How long they run.")] = 30.0,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of gup.")] = 2,
    wan_rate: Annotated[int, rate("Of the simulated WAN.", "10MB/s")] = 10_000_000,
    seed: SeedFlag = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up after the summary.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show gup at work: a simulated manager behind a slow WAN, a real gup, and a site of clients."""
    from gup.demo.run import demo as run

    with complaining():
        status = run(
            clients=clients,
            seconds=seconds,
            wan_rate_bytes_per_second=wan_rate,
            workers=workers,
            keep=keep,
            json_output=json_output,
            seed=seed,
        )
    raise typer.Exit(status)


@simulate.command("manager")
def simulate_manager(
    *,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where it listens; port 0 takes a free one.")
    ] = "127.0.0.1:8014",
    seed: SeedFlag = 1,
    wan_rate: Annotated[int, rate('Of the WAN in front of it; "0" is unlimited.', "10MB/s")] = 10_000_000,
    publish_interval: Annotated[
        float, duration("Between new revisions; 0 publishes none by itself.", "10s")
    ] = 10.0,
    products: Annotated[int, typer.Option(min=1, help="Streams of content.")] = 4,
    full_size: Annotated[int, size("Of a full package.", "4MB")] = 4_000_000,
) -> None:
    """Play a management server with a tree of content until SIGTERM or SIGINT."""
    from gup.demo.manager import simulate_manager as run

    with complaining():
        flags.host_port("--listen", listen)
        status = run(
            listen=listen,
            seed=seed,
            wan_rate_bytes_per_second=wan_rate,
            publish_interval_seconds=publish_interval,
            products=products,
            full_bytes=full_size,
        )
    raise typer.Exit(status)


@simulate.command("clients")
def simulate_clients(
    *,
    url: Annotated[str, typer.Option(metavar="URL", help="The server they ask: gup, or a manager.")],
    manager: Annotated[
        str, typer.Option(metavar="URL", help="The simulated manager; without it, asked at --url.")
    ] = "",
    clients: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="How long they run.")] = 30.0,
    seed: SeedFlag = 1,
    json_output: JsonFlag = False,
) -> None:
    """Play a site's clients, which compare every byte."""
    from gup.demo.clients import simulate_clients as run

    with complaining():
        status = run(
            url=url,
            count=clients,
            seconds=seconds,
            seed=seed,
            json_output=json_output,
            manager_url=manager,
        )
    raise typer.Exit(status)


app.add_typer(simulate, name="simulate")
app.add_typer(settings.config, name="config")
app.add_typer(operate.cache, name="cache")
app.add_typer(rules.rules, name="rules")
app.add_typer(report.report, name="report")
app.command("status")(operate.status)
app.command("reload")(operate.reload)
app.command("prefetch")(prefetch.prefetch)
