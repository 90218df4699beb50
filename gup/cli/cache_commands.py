"""`gup cache`: list, purge, pin, verify, export, import.

The last three work without a service too, on the cache directory.
"""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlencode

import typer

from gup.cli.format import ENTRY_HEADS, entry_row, print_json, show_table
from gup.cli.options import FAILED, JsonFlag, Where, asking, exiting, with_connection_flags, with_flags
from gup.content.key import Kind
from gup.units import bytes_in_words

if TYPE_CHECKING:
    from gup.cache.audit import Finding
    from gup.cache.importing import Custody
    from gup.cache.store import Store
    from gup.cli.admin_client import Admin
    from gup.config import Settings

cache = typer.Typer(help="Look at and change what a service keeps.", no_args_is_help=True)

T = TypeVar("T")
Filters = dict[str, str]
_POLL_SECONDS = 0.2
_SHOWN_EACH_SECONDS = 1.0
_PIECE_BYTES = 1 << 20
_IMPORT_SECONDS = 600.0
"""For an answer to an import: the last entry's commit waits for the disk."""

DirectoryFlag = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Look here, while no service runs on it.")
]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="As `gup cache list` shows them.")]


def _filter_flags(
    *,
    product: Annotated[str | None, typer.Option(help="Only of this product.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    language: Annotated[str | None, typer.Option(help="Only of this language.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only of this moniker.")] = None,
    revision: Annotated[str | None, typer.Option(help="Only of this revision.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only files of this kind.")] = None,
) -> Filters:
    named = {"product": product, "version": version, "language": language, "stream": stream}
    named |= {"revision": revision, "kind": kind}
    return {name: str(value) for name, value in named.items() if value is not None}


_with_filters = with_flags(filters=_filter_flags)


@cache.command("list")
@_with_filters
@with_connection_flags
def list_entries(
    *,
    filters: Filters,
    order: Annotated[
        str, typer.Option(help="key, used, stored, length or hits; -used is the other way round.")
    ] = "key",
    limit: Annotated[int, typer.Option(min=0, help="How many at most; 0 lists all.")] = 100,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """List entries; with --json each is one line."""
    with asking(where) as admin:
        for page in admin.entries(filters | {"order": order}, limit):
            if json_output:
                for entry in page:
                    typer.echo(json.dumps(entry, ensure_ascii=False))
            else:
                show_table(ENTRY_HEADS, [entry_row(entry) for entry in page])


@cache.command("purge")
@with_connection_flags
def purge(keys: Keys, *, where: Where, json_output: JsonFlag = False) -> None:
    """Remove entries; clients that are being sent one get the whole of it."""

    def purged(admin: "Admin", key: str) -> tuple[dict[str, Any], str]:
        answer = admin.purge(key)
        return answer, f"purged {key}: {bytes_in_words(answer['freed_bytes'])}"

    _each(keys, where, purged, json_output=json_output)


@cache.command("pin")
@with_connection_flags
def pin(keys: Keys, *, where: Where, json_output: JsonFlag = False) -> None:
    """Keep entries whatever the limits say."""
    _each(keys, where, lambda a, key: (a.pin(key, pinned=True), f"pinned {key}"), json_output=json_output)


@cache.command("unpin")
@with_connection_flags
def unpin(keys: Keys, *, where: Where, json_output: JsonFlag = False) -> None:
    """Let the limits apply to entries again."""
    _each(keys, where, lambda a, key: (a.pin(key, pinned=False), f"unpinned {key}"), json_output=json_output)


def _each(
    keys: list[str],
    where: Where,
    change: Callable[["Admin", str], tuple[dict[str, Any], str]],
    *,
    json_output: bool,
) -> None:
    """One line for one key, printed as soon as it is done."""
    with asking(where) as admin:
        for key in keys:
            answer, words = change(admin, key)
            typer.echo(json.dumps(answer, ensure_ascii=False) if json_output else words)


# --- by a service, or here


def _by_service_or_here(
    where: Where,
    directory: Path | None,
    by_service: Callable[["Admin"], T],
    here: Callable[[Path], T],
) -> T:
    """Work done by the service that the flags mean, or in the cache directory: when --cache-dir names one, or
    when no service answers where the settings put it.
    """
    from gup.cli.admin_client import NobodyThereError, admin_at
    from gup.config import load

    if directory is not None:
        return here(directory.absolute())
    try:
        return by_service(admin_at(where))
    except NobodyThereError:
        if where.url is not None:
            raise
    return here(load(where.config).cache.directory)


def _store(directory: Path) -> "Store":
    from gup.cache.store import Store
    from gup.errors import StoreError

    store = Store(directory)
    if not store.content.is_dir():
        raise StoreError(f"{directory} is no cache directory: it has no content/")
    return store


@contextmanager
def _alone(store: "Store") -> Iterator[None]:
    """Hold the locks that a service takes, so that none starts in between; StoreError when one runs."""
    from gup.process.instance_lock import InstanceLock

    store.prepare()
    lock = InstanceLock(store.run, wait_seconds=0.0)
    try:
        yield
    finally:
        lock.close()


# --- verify


@cache.command("verify")
@with_connection_flags
def verify(
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what is damaged, or drop it, so that it is fetched anew."),
    ] = False,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Compare everything stored with its sums; status 0 when all is right (or mended), 1 when not.

    A running service does it, and goes on serving. Without one it is done here, and none can start meanwhile.
    """
    with exiting():
        result = _by_service_or_here(
            where,
            cache_dir,
            lambda admin: _verify_by_service(admin, repair=repair),
            lambda directory: _verify_here(directory, repair=repair),
        )
    if json_output:
        print_json(result)
    else:
        _show_verified(result)
    if result["failed"] or result["damaged"] > (result["mended"] if repair else 0):
        raise typer.Exit(FAILED)


def _verify_by_service(admin: "Admin", *, repair: bool) -> dict[str, Any]:
    result = admin.verify(repair=repair)
    shown_at = 0.0
    while result["running"]:
        if time.monotonic() - shown_at > _SHOWN_EACH_SECONDS:
            _show_progress(result["checked"], result["total"], result["damaged"])
            shown_at = time.monotonic()
        time.sleep(_POLL_SECONDS)
        result = admin.verification()
    return result


def _verify_here(directory: Path, *, repair: bool) -> dict[str, Any]:
    from gup.cache.audit import Finding, check_entry, check_part, check_stray, contents
    from gup.cache.state import Phase
    from gup.control.index import check_index

    store = _store(directory)
    rows: list[dict[str, Any]] = []
    with _alone(store):
        for part in store.parts():  # a commit that was interrupted is no damage: its journal finishes it
            if repair and part.state is not None and part.state.phase is Phase.COMMITTED:
                store.finish_journal(part.state)
        names = contents(store, grace_seconds=0.0)
        checks: list[Callable[[], list[Finding]]] = [
            *(partial(check_entry, store, key) for key in names.keys),
            *(partial(check_part, store, id_) for id_ in names.ids),
            *(partial(check_stray, store, path) for path in names.strays),
        ]
        total = len(checks) + 1  # the index is one more
        for number, check in enumerate(checks, 1):
            rows += [_finding_row(found, _put_right(store, found) if repair else None) for found in check()]
            _show_progress(number, total, len(rows))
        if (why := check_index(store.index, repair=repair)) is not None:
            rows.append(_finding_row(Finding("index", "index", why), "" if repair else None))
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
    """Repair the finding; the reason when that failed, else ""."""
    from gup.cache.audit import put_right

    try:
        put_right(store, finding, alone=True)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _finding_row(finding: "Finding", why: str | None) -> dict[str, Any]:
    """A finding as the API shows it; `why` it could not be put right, None when that was not tried."""
    return {
        "where": finding.where,
        "path": finding.path,
        "key": finding.key.text if finding.key else None,
        "detail": finding.detail,
        "mended": None if why is None else not why,
        "why_not": why or None,
    }


def _show_progress(checked: int, total: int, damaged: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{checked} of {total} looked at, {damaged} damaged ", err=True, nl=checked == total)


def _show_verified(result: dict[str, Any]) -> None:
    for row in result["found"]:
        end = {None: "", True: " (mended)", False: f" (NOT mended: {row['why_not']})"}[row["mended"]]
        typer.echo(f"{row['where']}: {row['path']}: {row['detail']}{end}")
    if result["failed"]:
        typer.echo(f"ended early: {result['failed']}")
    busy = f", {result['busy']} left out because they were at work" if result["busy"] else ""
    mended = f", {result['mended']} mended" if result["repair"] else ""
    typer.echo(f"{result['checked']} looked at: {result['damaged']} damaged{mended}{busy}")


# --- export


@cache.command("export")
@_with_filters
@with_connection_flags
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive (tar) to write; must not exist.")],
    *,
    filters: Filters,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Write entries with their records to an archive, to seed another site with it.

    Status 1 when something had to be left out because it is damaged. Without a service all is exported.
    """
    target = "/api/v1/export?" + urlencode(filters)
    with exiting():
        from gup.cache.archive import summary

        with _new(file) as (archive, path):
            pieces = _by_service_or_here(
                where,
                cache_dir,
                lambda admin: admin.opened("GET", target).pieces(_PIECE_BYTES),
                lambda directory: _read_here(directory, filters),
            )
            for piece in pieces:
                archive.write(piece)
            archive.flush()
            told = summary(path)
    if json_output:
        print_json(told | {"file": str(file)})
    else:
        for row in told["left_out"]:
            typer.echo(f"left out: {row['key']}: {row['why']}")
        typer.echo(f"{file}: {told['entries']} entries, {bytes_in_words(told['bytes'])}")
    if told["left_out"]:
        raise typer.Exit(FAILED)


@contextmanager
def _new(file: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file beside `file`, which takes that name when it is whole; nothing is left when it is not."""
    from gup.cli.admin_client import AdminError

    if os.path.lexists(file):
        raise AdminError(f"{file} is there already; an export overwrites nothing")
    path = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with path.open("xb") as target:
            yield target, path
            os.fsync(target.fileno())
        os.link(path, file)  # unlike a rename, it overwrites nothing
    except OSError as error:
        raise AdminError(f"{file} can't be written: {error.strerror or error}") from error
    finally:
        path.unlink(missing_ok=True)


def _read_here(directory: Path, filters: Filters) -> Iterator[bytes]:
    """Committed bodies never change, so they can be read whoever else is at work there."""
    import socket

    from gup.cache.archive import written
    from gup.cache.audit import contents
    from gup.errors import StoreError

    odd = sorted({"product", "kind"} & filters.keys())
    if odd:
        raise StoreError(f"--{odd[0]}: only a running service can tell; none answers")
    store = _store(directory)
    keys = [
        key
        for key in contents(store, grace_seconds=0.0).keys
        if all(getattr(key, name).casefold() == value.casefold() for name, value in filters.items())
    ]
    yield from written(store, keys, socket.gethostname(), time.time())


# --- import


@cache.command("import")
@with_connection_flags
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that gup cache export wrote.")],
    *,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Take an archive's entries in: nothing is overwritten or evicted, what is damaged is refused.

    Status 1 when anything was refused or the archive is not whole; the rest of it is taken all the same.
    """
    with exiting():
        from gup.cli.admin_client import AdminError
        from gup.config import load

        try:
            with file.open("rb") as source:
                done = _by_service_or_here(
                    where,
                    cache_dir,
                    lambda admin: admin.send("/api/v1/import", source, "application/x-tar", _IMPORT_SECONDS),
                    lambda directory: _import_here(source, directory, load(where.config)),
                )
        except OSError as error:
            raise AdminError(f"{file} can't be read: {error.strerror or error}") from error
    if json_output:
        print_json(done)
    else:
        show_table(("refused", "why"), [(row["name"], row["why"]) for row in done["refused"]])
        if done["problem"]:
            typer.echo(done["problem"], err=True)
            sys.stderr.flush()
        typer.echo(
            f"{done['imported']} imported, {bytes_in_words(done['imported_bytes'])}; "
            f"{done['present']} were here already, {len(done['refused'])} refused"
        )
    if done["refused"] or not done["complete"]:
        raise typer.Exit(FAILED)


def _import_here(source: IO[bytes], directory: Path, settings: "Settings") -> dict[str, Any]:
    import pwd
    from dataclasses import asdict

    from gup.cache.importing import Import
    from gup.errors import StoreError

    store = _store(directory)
    owner = store.content.stat().st_uid
    if owner != os.geteuid():
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = str(owner)
        raise StoreError(
            f"{directory} belongs to user {name}, who could not use what another user puts there: "
            "run this as that user"
        )
    with _alone(store):
        return asdict(Import(store, _custody(store, settings), time.time()).take(source))


def _custody(store: "Store", settings: "Settings") -> "Custody":
    """No other process is at work: every claim is free, and room is what the limits leave."""
    from gup.cache.importing import Custody
    from gup.cache.record import Record
    from gup.control.eviction import no_room

    held = [sum(stored.size_bytes for stored in store.scan())]

    def room(length_bytes: int) -> str:
        figures = os.statvfs(store.root)
        return no_room(length_bytes, held[0], figures.f_bavail * figures.f_frsize, settings.cache)

    def taken(record: Record) -> None:
        held[0] += record.length

    return Custody(claim=lambda _: True, release=lambda _: None, room=room, taken=taken)
