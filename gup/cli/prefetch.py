"""`gup prefetch`: has a running service fetch content before anybody asks; fetches nothing itself."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gup.cli.asking import Where, asking
from gup.cli.complaining import FAILED
from gup.cli.options import AdminFlag, CaFlag, ConfigFlag, JsonFlag, TokenFlag
from gup.cli.tables import printable

if TYPE_CHECKING:
    from gup.cli.admin import Admin

_POLL_SECONDS = 0.2
_PENDING = ("queued", "fetching")
_WORDS = {
    "queued": "waits",
    "fetching": "is being fetched",
    "stored": "fetched and stored",
    "present": "stored already",
    "absent": "NOT FOUND: no upstream has it",
    "failed": "FAILED",
    "superseded": "not fetched: superseded",
}
_GOOD = ("stored", "present", *_PENDING)


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
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Fetch content before anybody asks, and wait for it; status 0 when all is stored, 1 when not.

    It is fetched while no client's fill needs the link, within wan.rate. Ctrl-C ends the waiting only.
    """
    with asking(Where(admin, config, token_file, ca_file)) as asked:
        wanted = [row for path in paths for row in asked.prefetch(path, version, language)["wanted"]]
        if not no_wait:
            wanted = _wait(asked, wanted)
    if json_output:
        typer.echo(json.dumps({"wanted": wanted}, indent=2, ensure_ascii=False))
    else:
        for row in wanted:
            detail = f" ({row['detail']})" if row["detail"] else ""
            typer.echo(printable(f"{row['key']}: {_WORDS.get(row['outcome'], row['outcome'])}{detail}"))
    if not all(row["outcome"] in _GOOD for row in wanted):
        raise typer.Exit(FAILED)


def _wait(asked: "Admin", wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows when none of them is pending any more."""
    latest = {row["key"]: row for row in wanted}
    while any(row["outcome"] in _PENDING for row in latest.values()):
        time.sleep(_POLL_SECONDS)
        listed = {row["key"]: row for row in asked.prefetched()["wanted"]}
        for key, row in latest.items():
            gone = {**row, "outcome": "failed", "detail": "it is not on the service's list any more"}
            latest[key] = listed.get(key, gone)
    return list(latest.values())
