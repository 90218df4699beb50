"""`gup cache verify`: by a running service, or here on the cache directory when none runs; serves nobody."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gup.cli.asking import Where, admin_at
from gup.cli.complaining import FAILED, complaining
from gup.cli.options import AdminFlag, CaFlag, ConfigFlag, JsonFlag, TokenFlag

if TYPE_CHECKING:
    from gup.cache.audit import Finding
    from gup.cache.store import Store
    from gup.cli.admin import Admin

_POLL_SECONDS = 0.2
_SHOWN_EACH_SECONDS = 1.0


def verify(
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what is damaged, or drop it, so that it is fetched anew."),
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look here, while no service runs on it.")
    ] = None,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Compare everything stored with its sums; status 0 when all is right (or mended), 1 when not.

    A running service does it, and goes on serving. Without one it is done here, and none can start meanwhile.
    """
    with complaining():
        where = Where(admin, config, token_file, ca_file)
        result = _result(where, repair=repair, cache_dir=cache_dir)
    if json_output:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _show(result)
    if result["failed"] or result["damaged"] > (result["mended"] if repair else 0):
        raise typer.Exit(FAILED)


def _result(where: Where, *, repair: bool, cache_dir: Path | None) -> dict[str, Any]:
    from gup.cli.admin import NobodyThereError
    from gup.config import load

    if cache_dir is not None:
        return _here(cache_dir.absolute(), repair=repair)
    try:
        return _by_service(admin_at(where), repair=repair)
    except NobodyThereError:
        if where.url is not None:
            raise
        return _here(load(where.config).cache.directory, repair=repair)


def _by_service(admin: "Admin", *, repair: bool) -> dict[str, Any]:
    result = admin.verify(repair=repair)
    shown_at = 0.0
    while result["running"]:
        if time.monotonic() - shown_at > _SHOWN_EACH_SECONDS:
            _progress(result["checked"], result["total"], result["damaged"])
            shown_at = time.monotonic()
        time.sleep(_POLL_SECONDS)
        result = admin.verification()
    return result


def _here(directory: Path, *, repair: bool) -> dict[str, Any]:
    """Hold the locks that a service takes, so that none starts in between; StoreError when one runs."""
    from gup.cache.store import Store
    from gup.errors import StoreError
    from gup.process.instance import Instance

    store = Store(directory)
    if not store.content.is_dir():
        raise StoreError(f"{directory} is no cache directory: it has no content/")
    store.prepare()
    instance = Instance(store.run, wait_seconds=0.0)
    try:
        return _look(directory, repair=repair)
    finally:
        instance.close()


def _look(directory: Path, *, repair: bool) -> dict[str, Any]:
    from gup.cache.audit import Finding, check_entry, check_part, check_stray, contents
    from gup.cache.state import Phase
    from gup.cache.store import Store
    from gup.control.index import check_index

    store = Store(directory)
    for part in store.parts():  # a commit that was interrupted is no damage: its journal finishes it
        if repair and part.state is not None and part.state.phase is Phase.COMMITTED:
            store.finish_commit(part.state)
    names = contents(store, grace_seconds=0.0)
    total = len(names.keys) + len(names.ids) + len(names.strays) + 1
    rows: list[dict[str, Any]] = []
    looks: list[Callable[[], list[Finding]]] = [
        *(partial(check_entry, store, key) for key in names.keys),
        *(partial(check_part, store, id_) for id_ in names.ids),
        *(partial(check_stray, store, path) for path in names.strays),
    ]
    for number, look in enumerate(looks, 1):
        rows += [_row(finding, _put_right(store, finding) if repair else None) for finding in look()]
        _progress(number, total, len(rows))
    if (why := check_index(store.index, repair=repair)) is not None:
        rows.append(_row(Finding("index", "index", why), "" if repair else None))
    return {
        "running": False,
        "repair": repair,
        "failed": None,
        "checked": total,
        "total": total,
        "busy": 0,
        "damaged": len(rows),
        "mended": sum(row["mended"] is True for row in rows),
        "found": rows,
    }


def _put_right(store: "Store", finding: "Finding") -> str:
    """Put it right; why that could not be."""
    from gup.cache.audit import put_right

    try:
        put_right(store, finding, alone=True)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _row(finding: "Finding", why: str | None) -> dict[str, Any]:
    """A finding as the API shows it; `why` it could not be put right, None when that was not tried."""
    return {
        "where": finding.where,
        "path": finding.path,
        "key": finding.key.text if finding.key else None,
        "detail": finding.detail,
        "mended": None if why is None else not why,
        "why_not": why or None,
    }


def _progress(checked: int, total: int, damaged: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{checked} of {total} looked at, {damaged} damaged ", err=True, nl=checked == total)


def _show(result: dict[str, Any]) -> None:
    for row in result["found"]:
        end = {None: "", True: " (mended)", False: f" (NOT mended: {row['why_not']})"}[row["mended"]]
        typer.echo(f"{row['where']}: {row['path']}: {row['detail']}{end}")
    if result["failed"]:
        typer.echo(f"ended early: {result['failed']}")
    busy = f", {result['busy']} left out because they were at work" if result["busy"] else ""
    mended = f", {result['mended']} mended" if result["repair"] else ""
    typer.echo(f"{result['checked']} looked at: {result['damaged']} damaged{mended}{busy}")
