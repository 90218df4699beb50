"""`gup status`, `gup reload`, `gup prefetch`: asked of a running service."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gup.cli.format import (
    FILL_HEADS,
    UPSTREAM_HEADS,
    fill_row,
    print_json,
    printable,
    show_table,
    status_lines,
    upstream_row,
)
from gup.cli.options import FAILED, JsonFlag, Where, asking, with_connection_flags

if TYPE_CHECKING:
    from gup.cli.admin_client import Admin

_POLL_SECONDS = 0.2
_PENDING = ("queued", "fetching")
_OUTCOMES = {
    "queued": "waits",
    "fetching": "is being fetched",
    "stored": "fetched and stored",
    "present": "stored already",
    "absent": "NOT FOUND: no upstream has it",
    "failed": "FAILED",
    "superseded": "not fetched: superseded",
}
_GOOD = ("stored", "present", *_PENDING)


@with_connection_flags
def status(*, where: Where, json_output: JsonFlag = False) -> None:
    """Show what a running service saved, keeps and does."""
    with asking(where) as admin:
        answer = admin.status()
        if json_output:
            print_json(answer)
            return
        for line in status_lines(answer):
            typer.echo(line)
        show_table(UPSTREAM_HEADS, [upstream_row(row) for row in answer["upstreams"]])
        show_table(FILL_HEADS, [fill_row(row) for row in answer["fills"]])


@with_connection_flags
def reload(*, where: Where, json_output: JsonFlag = False) -> None:
    """Have a running service read its settings again; exit status 1 if it can't use them."""
    with asking(where) as admin:
        answer = admin.reload()
    if json_output:
        print_json(answer)
    elif answer["reloaded"]:
        typer.echo("the settings were read again and are in force")
    else:
        typer.echo("the settings before stay in force:", err=True)
        for problem in answer["problems"]:
            typer.echo(f"  {problem}", err=True)
    if not answer["reloaded"]:
        raise typer.Exit(FAILED)


@with_connection_flags
def prefetch(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Such as /content/{MONIKER}/260101001/full.zip.")
    ],
    *,
    version: Annotated[
        str | None, typer.Option(help="Only from upstreams of this version; without it, of each.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Only from upstreams of this language; without it, of each.")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Put it on the list and return; status 0 then.")
    ] = False,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Fetch content before anybody asks, and wait for it; status 0 when all is stored, 1 when not.

    It is fetched while no client's fill needs the link, within wan.rate. Ctrl-C ends the waiting only.
    """
    with asking(where) as admin:
        wanted = [row for path in paths for row in admin.prefetch(path, version, language)["wanted"]]
        if not no_wait:
            wanted = _wait(admin, wanted)
    if json_output:
        print_json({"wanted": wanted})
    else:
        for row in wanted:
            detail = f" ({row['detail']})" if row["detail"] else ""
            typer.echo(printable(f"{row['key']}: {_OUTCOMES.get(row['outcome'], row['outcome'])}{detail}"))
    if not all(row["outcome"] in _GOOD for row in wanted):
        raise typer.Exit(FAILED)


def _wait(admin: "Admin", wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows when none of them is pending any more."""
    latest = {row["key"]: row for row in wanted}
    while any(row["outcome"] in _PENDING for row in latest.values()):
        time.sleep(_POLL_SECONDS)
        listed = {row["key"]: row for row in admin.prefetched()["wanted"]}
        for key, row in latest.items():
            gone = {**row, "outcome": "failed", "detail": "it is not on the service's list any more"}
            latest[key] = listed.get(key, gone)
    return list(latest.values())
