"""`gup cache`: list, purge, pin, verify, export, import.

The last three work without a service too, on the cache directory.
"""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import typer

from gup.cli.admin_commands import without
from gup.cli.shared import (
    FAILED,
    UNUSABLE,
    Columns,
    Commands,
    JsonFlag,
    Where,
    asking,
    print_json,
    printable,
    quantity,
    show_table,
    with_connection_flags,
    with_flags,
)
from gup.units import bytes_in_words, parse_duration

if TYPE_CHECKING:
    from gup.cache.store import Store
    from gup.cli.admin_client import Admin
    from gup.config import Settings
    from gup.process.instance_lock import InstanceLock

cache = typer.Typer(cls=Commands, help="List and change stored content.", no_args_is_help=True)

T = TypeVar("T")
Filters = dict[str, str]
_PAGE = 1000
_POLL_SECONDS = 0.2
_PURGE_SECONDS = 600.0
_IMPORT_SECONDS = 600.0
"""Time limit for the response to an import: the last entry's commit waits for the disk."""

DirectoryFlag = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", metavar="DIR", help="Work on this cache directory; no service may run on it."
    ),
]
Keys = Annotated[list[str], typer.Argument(metavar="KEY", help="As `gup cache list` shows them.")]


def _age(help_: str) -> Any:
    return Annotated[float | None, quantity(parse_duration, "AGE", f'{help_} Such as "30d".', "")]


def _filter_flags(
    *,
    product: Annotated[str | None, typer.Option(metavar="PRODUCT", help="Only of this product.")] = None,
    version: Annotated[str | None, typer.Option(metavar="VERSION", help="Only of this version.")] = None,
    language: Annotated[str | None, typer.Option(metavar="LANGUAGE", help="Only of this language.")] = None,
    stream: Annotated[str | None, typer.Option(metavar="MONIKER", help="Only of this moniker.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Only of this revision.")] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Only full, delta, index or other files.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help='Only keys that match, such as "*/full.zip": * is any text.'),
    ] = None,
    older_than: _age("Only what was stored at least this long ago.") = None,  # type: ignore[valid-type]
    unused_for: _age("Only entries that no client was sent within this time.") = None,  # type: ignore[valid-type]
) -> Filters:
    named = {"product": product, "version": version, "language": language, "stream": stream}
    named |= {"revision": revision, "kind": kind, "pattern": pattern}
    ages = {"older_than": older_than, "unused_for": unused_for}
    named |= {name: None if age is None else str(math.ceil(age)) for name, age in ages.items()}
    return {name: value for name, value in named.items() if value is not None}


_with_filters = with_flags(filters=_filter_flags)

_ENTRIES: Columns = {
    "product": lambda entry: entry["product"] if entry["product"] != entry["stream"] else "",
    "revision": lambda entry: entry["content_revision"] or entry["revision"],
    "kind": "kind",
    "#size": "length_bytes",
    "#hits": "hits",
    "last used": "used_at",
    "": lambda entry: "pinned" if entry["pinned"] else "",
    "key": "key",
}


@cache.command("list")
@_with_filters
@with_connection_flags
def list_entries(
    *,
    filters: Filters,
    order: Annotated[
        str,
        typer.Option(
            metavar="ORDER", help="name, key, used, stored, length or hits; -used reverses the order."
        ),
    ] = "name",
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Maximum number of entries; 0 lists all.")
    ] = 100,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """List entries; with --json each is one line."""
    with asking(where) as admin:
        left = _list(admin, filters | {"order": order}, limit or sys.maxsize, json_output=json_output)
        if left is None:
            stored = admin.ask("GET", "content?limit=1")["matching"]
            typer.echo(f"no entry matches: {stored} are stored" if stored else "nothing is stored", err=True)


def _list(admin: "Admin", query: Filters, most: int, *, json_output: bool) -> int | None:
    """Print `limit` entries at most; how many more there are, None when there are none at all."""
    left, matching = most, 0
    while left:
        answer = admin.ask("GET", "content?" + urlencode(query | {"limit": str(min(left, _PAGE))}))
        matching = answer["matching"]
        if json_output:
            for entry in answer["entries"]:
                typer.echo(json.dumps(entry, ensure_ascii=False))
        else:
            show_table(_ENTRIES, answer["entries"])
        left -= len(answer["entries"])
        if answer["cursor"] is None:
            break
        query["cursor"] = answer["cursor"]
    return max(0, matching - most) if matching else None


_DRY_RUN_ROWS = 20
_TIMES = {"older_than", "unused_for"}


@cache.command("purge")
@_with_filters
@with_connection_flags
def purge(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="As `gup cache list` shows them.")
    ] = None,
    *,
    filters: Filters,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")
    ] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help="Include pinned entries.")] = False,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Remove entries by key or by filter; clients that are receiving one still get it whole.

    What is being fetched is not stored, and clients that ask afterwards get what is fetched afterwards.
    Entries named by key are removed even if pinned. Filters leave pinned entries; --older-than and
    --unused-for those that are being fetched or checked, too: status 1 if there were such.
    """
    if bool(keys) == bool(filters) or (keys and (dry_run or pinned)):
        typer.echo(
            "gup: give keys or filters such as --product, not both; --dry-run and --pinned need filters",
            err=True,
        )
        raise typer.Exit(UNUSABLE)
    with asking(where) as admin:
        if keys:
            _change_each(admin, keys, "purged", "DELETE", "", json_output=json_output)
            return
        query = filters | {"dry_run": str(int(dry_run)), "pinned": str(int(pinned))}
        answer = admin.understood(
            admin.pieces("DELETE", "content?" + urlencode(query), patience_seconds=_PURGE_SECONDS)
        )
        if json_output:
            print_json(answer)
        else:
            if dry_run and (
                more := _list(admin, filters | {"order": "name"}, _DRY_RUN_ROWS, json_output=False)
            ):
                typer.echo(f"and {more} more")
            freed = bytes_in_words(answer["freed_bytes"])
            left = "".join(
                f", {answer[name]} left: {why}"
                for name, why in (("pinned", "pinned"), ("busy", "being fetched or checked"))
                if answer[name]
            )
            done, are = ("would be purged", "would not be") if dry_run else ("purged", "are not")
            # A filter by times selects only what is stored.
            arriving = "" if filters.keys() & _TIMES else f"; matching fetches under way {are} stored"
            typer.echo(f"{answer['entries']} entries {done}, {freed}{left}{arriving}{without(answer)}")
    if answer["busy"]:
        raise typer.Exit(FAILED)


def _change_each(
    admin: "Admin", keys: list[str], done: str, method: str, below: str, *, json_output: bool
) -> None:
    """One line for one key, printed as soon as it is done."""
    for key in keys:
        answer = admin.ask(method, f"content/{quote(key)}{below}")
        freed = "" if below else f": {bytes_in_words(answer['freed_bytes'])}"
        if not below and not answer["freed_bytes"]:
            freed += "; a fetch of it under way is not stored"
        words = f"{done} {key}{freed}{without(answer)}"
        typer.echo(json.dumps(answer, ensure_ascii=False) if json_output else words)


@cache.command("pin")
@with_connection_flags
def pin(keys: Keys, *, where: Where, json_output: JsonFlag = False) -> None:
    """Exempt entries from eviction."""
    with asking(where) as admin:
        _change_each(admin, keys, "pinned", "PUT", "/pin", json_output=json_output)


@cache.command("unpin")
@with_connection_flags
def unpin(keys: Keys, *, where: Where, json_output: JsonFlag = False) -> None:
    """Make entries evictable again."""
    with asking(where) as admin:
        _change_each(admin, keys, "unpinned", "DELETE", "/pin", json_output=json_output)


# --- by a service, or in the cache directory


def _by_service_or_here(
    where: Where,
    directory: Path | None,
    by_service: Callable[["Admin"], T],
    here: Callable[["Store"], T],
    *,
    create: bool = False,
) -> T:
    """Work done by the service that the flags name, or in the cache directory: when --cache-dir names one, or
    when no service answers at the settings' address. `create`: the directory may be missing, or be empty.
    """
    from gup.cache.store import Store
    from gup.cli.admin_client import NobodyThereError
    from gup.config import load
    from gup.errors import StoreError

    if directory is None:
        try:
            with asking(where) as admin:
                return by_service(admin)
        except NobodyThereError:
            if where.url is not None:
                raise
    store = Store(directory.absolute() if directory is not None else load(where.config).cache.directory)
    if not (store.content.is_dir() or (create and _is_new(store.root))):
        raise StoreError(f"{store.root} is no cache directory: it has no content/")
    return here(store)


def _is_new(folder: Path) -> bool:
    """Whether a folder is missing or empty, as before the first start."""
    if not os.path.lexists(folder):
        return True
    return folder.is_dir() and all(path.name == "lost+found" for path in folder.iterdir())


def _alone(store: "Store") -> "closing[InstanceLock]":
    """Hold the locks of a service, so that none starts in between; StoreError when one runs."""
    from gup.process.instance_lock import InstanceLock

    store.prepare()
    return closing(InstanceLock(store.run, wait_seconds=0.0))


# --- verify


@cache.command("verify")
@with_connection_flags
def verify(
    *,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Repair damaged entries, or remove them so that they are fetched again."
        ),
    ] = False,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Compare all stored content with its sums; status 0 when all is right or repaired, else 1.

    A running service does this while it serves. Without one the command does; none can start meanwhile.
    """
    result = _by_service_or_here(
        where, cache_dir, partial(_verify_by_service, repair=repair), partial(_verify_here, repair=repair)
    )
    if json_output:
        print_json(result)
    else:
        for row in result["found"]:
            end = {None: "", True: " (repaired)", False: f" (NOT repaired: {row['why_not']})"}[row["mended"]]
            typer.echo(f"{row['where']}: {row['path']}: {row['detail']}{end}")
        if result["failed"]:
            typer.echo(f"ended early: {result['failed']}")
        busy = f", {result['busy']} left out because of fills" if result["busy"] else ""
        mended = f", {result['mended']} repaired" if result["repair"] else ""
        typer.echo(f"{result['checked']} checked: {result['damaged']} damaged{mended}{busy}")
    if result["failed"] or result["damaged"] > (result["mended"] if repair else 0):
        raise typer.Exit(FAILED)


def _verify_by_service(admin: "Admin", *, repair: bool) -> dict[str, Any]:
    result = admin.ask("POST", f"verify?repair={int(repair)}")
    while result["running"]:
        _show_progress(result["checked"], result["total"], result["damaged"])
        time.sleep(_POLL_SECONDS)
        result = admin.ask("GET", "verify")
    return result


def _verify_here(store: "Store", *, repair: bool) -> dict[str, Any]:
    from gup.cache.integrity import Finding, check_entry, check_part, check_stray, contents, put_right
    from gup.control.index import check_index

    rows: list[dict[str, Any]] = []

    def note(finding: Finding, why_not: str = "") -> None:
        key, mended = finding.key.text if finding.key else None, not why_not if repair else None
        row = {"where": finding.where, "path": finding.path, "key": key, "detail": finding.detail}
        rows.append(row | {"mended": mended, "why_not": why_not or None})

    with _alone(store):
        names = contents(store, grace_seconds=0.0)
        checks: list[Callable[[], list[Finding]]] = [
            *(partial(check_entry, store, key) for key in names.keys),
            *(partial(check_part, store, id_) for id_ in names.ids),
            *(partial(check_stray, store, path) for path in names.strays),
        ]
        total = len(checks) + 1  # the index is one more
        for number, check in enumerate(checks, 1):
            for finding in check():
                why_not = ""
                try:
                    if repair:
                        put_right(store, finding, alone=True)
                except (OSError, ValueError) as error:
                    why_not = str(error)
                note(finding, why_not)
            _show_progress(number, total, len(rows))
        if (why := check_index(store.index, repair=repair)) is not None:
            note(Finding("index", "index", why))
    done = {"running": False, "repair": repair, "failed": None, "checked": total, "total": total, "busy": 0}
    mended = sum(row["mended"] is True for row in rows)
    return done | {"damaged": len(rows), "mended": mended, "found": rows}


def _show_progress(checked: int, total: int, damaged: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{checked} of {total} checked, {damaged} damaged ", err=True, nl=checked == total)


# --- export


@cache.command("export")
@_with_filters
@with_connection_flags
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive (tar) to write; must not exist.")],
    *,
    filters: Filters,
    sign_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Sign the archive with this private Ed25519 key (PEM)."),
    ] = None,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Write entries with their records to an archive, to seed another site.

    With --version and --language it has what a site of these needs, content for all versions or languages
    too. Entries left out are counted, with the reason. Status 1 when damaged entries were left out.
    """
    import asyncio

    from gup.cache.archive import summary
    from gup.cache.signature import read_signing_key, sign

    key = read_signing_key(sign_key) if sign_key is not None else None
    with _new(file) as (archive, path):
        _by_service_or_here(
            where,
            cache_dir,
            lambda admin: archive.writelines(admin.pieces("GET", "export?" + urlencode(filters))),
            lambda store: asyncio.run(_write_here(archive, store, filters)),
        )
        archive.flush()
        result = summary(path)
        signer = sign(path, key) if key is not None else None
    if json_output:
        print_json(result | {"file": str(file), "signed_by": signer})
    else:
        for row in result["left_out"]:
            typer.echo(f"left out: {row['key']}: {row['why']}")
        for why, count in result["not_wanted"].items():
            typer.echo(f"left out: {count} entries: {printable(why)}")
        signed = f"signed by the key {signer}" if signer is not None else "not signed"
        typer.echo(f"{file}: {result['entries']} entries, {bytes_in_words(result['bytes'])}, {signed}")
    if result["left_out"]:
        raise typer.Exit(FAILED)


@contextmanager
def _new(file: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file beside `file` that is renamed when complete; on an error nothing is left."""
    from gup.cli.admin_client import AdminError

    if os.path.lexists(file):
        raise AdminError(f"{file} exists; an export does not overwrite files")
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


async def _write_here(archive: IO[bytes], store: "Store", filters: Filters) -> None:
    """Committed bodies never change, so they can be read while a service runs."""
    import socket

    from gup.cache.archive import written
    from gup.cache.integrity import contents
    from gup.content.variant_choice import why_not_for
    from gup.errors import StoreError

    if odd := sorted({"product", "kind", "pattern", "older_than", "unused_for"} & filters.keys()):
        flag = odd[0].replace("_", "-")
        raise StoreError(f"--{flag}: works only with a running service; none answers")
    keys, not_wanted = [], Counter[str]()
    others = {name: filters[name].casefold() for name in ("stream", "revision") if name in filters}
    for key in contents(store, grace_seconds=0.0).keys:
        why = why_not_for(key.variant, filters.get("version"), filters.get("language"), None)
        if not why and any(getattr(key, name).casefold() != value for name, value in others.items()):
            why = f"it is not of that {', '.join(others)}"
        if why:
            not_wanted[why] += 1
        else:
            keys.append(key)
    async for piece in written(store, keys, socket.gethostname(), time.time(), not_wanted):
        archive.write(piece)


# --- import


@cache.command("import")
@with_connection_flags
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that gup cache export wrote.")],
    *,
    signed_by: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="GUP_SIGNED_BY",
            help="Take nothing unless the archive is signed by this key (public Ed25519 key, PEM).",
        ),
    ] = None,
    cache_dir: DirectoryFlag = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Import the entries of an archive; nothing is overwritten or evicted, damaged entries are refused.

    Status 1 when entries were refused or the archive is truncated; the others are imported.
    """
    from gup.cache.signature import require_signer, signer_of
    from gup.cli.admin_client import AdminError
    from gup.config import load

    try:
        with file.open("rb") as source:
            signer = signer_of(source) if source.seekable() else None
            if signed_by is not None:
                require_signer(signer, signed_by)
            done = _by_service_or_here(
                where,
                cache_dir,
                lambda admin: admin.understood(
                    admin.pieces("POST", "import", source, "application/x-tar", _IMPORT_SECONDS)
                ),
                lambda store: _import_here(source, store, load(where.config)),
                create=True,
            )
    except OSError as error:
        raise AdminError(f"{file} can't be read: {error.strerror or error}") from error
    if json_output:
        print_json(done | {"signed_by": signer})
    else:
        trusted = (
            "as required" if signed_by is not None else "whether it is trusted was not asked: --signed-by"
        )
        typer.echo(f"signed by the key {signer} ({trusted})" if signer else "the archive is not signed")
        show_table({"refused": "name", "why": "why"}, done["refused"])
        if done["problem"]:
            typer.echo(done["problem"], err=True)
            sys.stderr.flush()
        took = f"{done['imported']} imported, {bytes_in_words(done['imported_bytes'])}"
        typer.echo(f"{took}; {done['present']} were stored already, {len(done['refused'])} refused")
    if done["refused"] or not done["complete"]:
        raise typer.Exit(FAILED)


def _import_here(source: IO[bytes], store: "Store", settings: "Settings") -> dict[str, Any]:
    import pwd
    from dataclasses import asdict

    from gup.cache.archive import Import
    from gup.cache.records import Record
    from gup.control.eviction import no_room
    from gup.errors import StoreError

    there = next((folder for folder in (store.content, store.root) if folder.exists()), None)
    owner = there.stat().st_uid if there is not None else os.geteuid()
    if owner != os.geteuid():
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = str(owner)
        raise StoreError(
            f"{store.root} belongs to user {name}, who could not use files of another user: "
            "run this command as that user"
        )
    held_bytes = 0

    def room(length_bytes: int) -> str:
        figures = os.statvfs(store.root)
        return no_room(length_bytes, held_bytes, figures.f_bavail * figures.f_frsize, settings.cache)

    def taken(record: Record) -> None:
        nonlocal held_bytes
        held_bytes += record.length

    if not store.content.exists():
        typer.echo(
            f"{store.root} is made for the user who runs this: the service must run as that user", err=True
        )
    with _alone(store):  # no other process is at work: every claim is free
        held_bytes = sum(stored.size_bytes for stored in store.scan())
        return asdict(Import(store, time.time(), room, taken).take(source))
