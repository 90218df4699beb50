"""The commands that run something: the service, the demo, and each side of a simulated site."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from gup.cli.shared import Commands, ConfigFlag, JsonFlag, SeedFlag, quantity
from gup.errors import SettingsError
from gup.units import parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from gup.config import Settings

_HOST_PORT = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*):([0-9]{1,5})")

simulate = typer.Typer(
    cls=Commands,
    help="Run one side of a simulated site: the management server, or the clients.",
    no_args_is_help=True,
)
ClientsFlag = Annotated[int, typer.Option(min=1, metavar="N", help="Simulated clients.")]
SecondsFlag = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="How long they run.")]


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
    flags, problems = serve_flags(upstream or [], listen, admin, cache_dir, workers)

    def read() -> "Settings":
        from gup.cli.usable import usable

        return usable(config, flags, problems, servable=True)

    first = read()
    from gup.process import supervisor

    raise typer.Exit(supervisor.serve(first, reload=read))


def serve_flags(
    upstream: Sequence[str],
    listen: str | None = None,
    admin: str | None = None,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The given flags, nested like the file, and a sentence for each malformed one."""
    problems: list[str] = []
    addresses: dict[str, Any] = {}
    for flag, text, prefix in (("--listen", listen, ""), ("--admin", admin, "admin_")):
        if text is not None:
            try:
                host, addresses[f"{prefix}port"] = host_port(flag, text)
            except SettingsError as error:
                problems += error.problems
                continue
            addresses |= {f"{prefix}address": host} if host else {}
    flags: dict[str, Any] = {
        "listen": addresses,
        "upstream": [{"url": url} for url in upstream],
        "cache": {"directory": cache_dir} if cache_dir is not None else {},
        "workers": {"count": workers} if workers is not None else {},
    }
    return {section: values for section, values in flags.items() if values}, problems


def host_port(flag: str, text: str) -> tuple[str, int]:
    """Host ("" when left out) and port of "127.0.0.1:2967", "[::1]:2967" or ":2967"; SettingsError else."""
    match = _HOST_PORT.fullmatch(text.strip())
    if match is None or int(match[2]) > 65535 or match[1] == "[]":
        right = "must be HOST:PORT, such as 127.0.0.1:2967, [::1]:2967 or :2967"
        raise SettingsError([f"{flag}: {text!r} is not right: {right}"])
    return match[1].strip("[]"), int(match[2])


def demo(
    *,
    clients: ClientsFlag = 200,
    seconds: SecondsFlag = 30.0,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Worker processes of gup.")] = 2,
    wan_rate: Annotated[int, quantity(parse_rate, "RATE", "Of the simulated WAN.", "10MB/s")] = 10_000_000,
    seed: SeedFlag = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up after the summary.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show gup at work: a simulated manager behind a slow WAN, a real gup, and a site of clients."""
    from gup.demo import run

    plan = run.Plan(clients, seconds, wan_rate, workers, keep, seed)
    raise typer.Exit(run.demo(plan, json_output=json_output))


def http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise typer.BadParameter(f"{text!r} is not right: a URL is like http://127.0.0.1:2967")
    return text


def share(what: str) -> Any:
    return typer.Option(min=0.0, max=1.0, metavar="SHARE", help=f"{what} 0.05 is one in twenty.")


@simulate.command("manager")
def simulate_manager(  # noqa: PLR0913 - one parameter a flag
    *,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where it listens; port 0 takes a free one.")
    ] = "127.0.0.1:8014",
    seed: SeedFlag = 1,
    wan_rate: Annotated[
        int, quantity(parse_rate, "RATE", 'Of the WAN in front of it; "0" is unlimited.', "10MB/s")
    ] = 10_000_000,
    publish_interval: Annotated[
        float,
        quantity(parse_duration, "DURATION", "Between new revisions; 0 publishes none by itself.", "10s"),
    ] = 10.0,
    products: Annotated[int, typer.Option(min=1, metavar="N", help="Streams of content.")] = 4,
    full_size: Annotated[int, quantity(parse_size, "SIZE", "Of a full package.", "4MB")] = 4_000_000,
    delta_size: Annotated[int, quantity(parse_size, "SIZE", "Of a delta, on average.", "200kB")] = 200_000,
    errors: Annotated[float, share("Requests for content that are answered with 503.")] = 0.0,
    cuts: Annotated[float, share("Bodies that break off.")] = 0.0,
    wrong: Annotated[float, share("Bodies with one byte changed.")] = 0.0,
    delay: Annotated[float, quantity(parse_duration, "DURATION", "Before each answer.", "0s")] = 0.0,
) -> None:
    """Run a simulated management server with content until SIGTERM or SIGINT."""
    from gup.demo import manager

    host, port = host_port("--listen", listen)
    manager.simulate_manager(
        host,
        port,
        seed=seed,
        wan_rate_bytes_per_second=wan_rate,
        publish_interval_seconds=publish_interval,
        products=products,
        full_bytes=full_size,
        delta_bytes=delta_size,
        faults=manager.Faults(errors, cuts, wrong, delay),
    )


@simulate.command("clients")
def simulate_clients(
    *,
    url: Annotated[
        str, typer.Option(parser=http_url, metavar="URL", help="The server they ask: gup, or a manager.")
    ],
    manager: Annotated[
        str | None,
        typer.Option(
            parser=http_url, metavar="URL", help="The simulated manager; without it, asked at --url."
        ),
    ] = None,
    clients: ClientsFlag = 200,
    seconds: SecondsFlag = 30.0,
    seed: SeedFlag = 1,
    json_output: JsonFlag = False,
) -> None:
    """Run simulated clients, which compare every byte."""
    from gup.demo.clients import simulate_clients as run

    raise typer.Exit(
        run(url, manager or url, count=clients, seconds=seconds, seed=seed, json_output=json_output)
    )
