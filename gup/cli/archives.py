"""`gup cache export` and `import`: by a running service, or here on the cache directory when none runs."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from gup.cli.asking import Where, admin_at
from gup.cli.complaining import FAILED, complaining
from gup.cli.options import AdminFlag, CaFlag, ConfigFlag, JsonFlag, TokenFlag
from gup.cli.tables import show_table
from gup.content.key import Kind

if TYPE_CHECKING:
    from gup.cache.importing import Custody
    from gup.cache.store import Store
    from gup.config import Settings

_PIECE_BYTES = 1 << 20
_PATIENCE_SECONDS = 600.0
"""For an answer: the last entry's commit waits for the disk."""

DirectoryFlag = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Look here, while no service runs on it.")
]


def export(  # noqa: PLR0913 - each filter is a flag
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive (tar) to write; must not exist.")],
    *,
    product: Annotated[str | None, typer.Option(help="Only of this product.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    language: Annotated[str | None, typer.Option(help="Only of this language.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only of this moniker.")] = None,
    revision: Annotated[str | None, typer.Option(help="Only of this revision.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only files of this kind.")] = None,
    cache_dir: DirectoryFlag = None,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Write entries with their records to an archive, to seed another site with it.

    Status 1 when something had to be left out because it is damaged. Without a service all is exported.
    """
    named = {"product": product, "version": version, "language": language, "stream": stream}
    named |= {"revision": revision, "kind": kind}
    filters = {name: str(value) for name, value in named.items() if value is not None}
    with complaining():
        from gup.cache.archive import summary

        with _new(file) as (target, path):
            for piece in _pieces(Where(admin, config, token_file, ca_file), filters, cache_dir):
                target.write(piece)
            target.flush()
            told = summary(path)
    if json_output:
        typer.echo(json.dumps(told | {"file": str(file)}, indent=2, ensure_ascii=False))
    else:
        _show_export(file, told)
    if told["left_out"]:
        raise typer.Exit(FAILED)


@contextmanager
def _new(file: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file beside `file`, which takes that name when it is whole; nothing is left when it is not."""
    from gup.cli.admin import AdminError

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


def _pieces(where: Where, filters: dict[str, str], cache_dir: Path | None) -> Iterator[bytes]:
    from gup.cli.admin import NobodyThereError

    if cache_dir is not None:
        yield from _read_here(cache_dir.absolute(), filters)
        return
    try:
        answer = admin_at(where).opened("GET", "/api/v1/export?" + urlencode(filters))
    except NobodyThereError:
        if where.url is not None:
            raise
        yield from _read_here(_settings(where.config).cache.directory, filters)
        return
    with answer:
        while piece := answer.read(_PIECE_BYTES):
            yield piece


def _read_here(directory: Path, filters: dict[str, str]) -> Iterator[bytes]:
    """What is published never changes, so it can be read whoever else is at work there."""
    import socket
    import time

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


def _show_export(file: Path, told: dict[str, Any]) -> None:
    from gup.units import bytes_in_words

    for row in told["left_out"]:
        typer.echo(f"left out: {row['key']}: {row['why']}")
    typer.echo(f"{file}: {told['entries']} entries, {bytes_in_words(told['bytes'])}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive that gup cache export wrote.")],
    *,
    cache_dir: DirectoryFlag = None,
    admin: AdminFlag = None,
    config: ConfigFlag = None,
    token_file: TokenFlag = None,
    ca_file: CaFlag = None,
    json_output: JsonFlag = False,
) -> None:
    """Take an archive's entries in: nothing is overwritten or evicted, what is damaged is refused.

    Status 1 when anything was refused or the archive is not whole; the rest of it is taken all the same.
    """
    with complaining():
        from gup.cli.admin import AdminError

        try:
            with file.open("rb") as source:
                done = _taken(source, Where(admin, config, token_file, ca_file), cache_dir)
        except OSError as error:
            raise AdminError(f"{file} can't be read: {error.strerror or error}") from error
    if json_output:
        typer.echo(json.dumps(done, indent=2, ensure_ascii=False))
    else:
        _show_import(done)
    if done["refused"] or not done["complete"]:
        raise typer.Exit(FAILED)


def _taken(source: IO[bytes], where: Where, cache_dir: Path | None) -> dict[str, Any]:
    from gup.cli.admin import NobodyThereError

    if cache_dir is not None:
        return _take_here(source, cache_dir.absolute(), _settings(where.config))
    try:
        return admin_at(where).send("/api/v1/import", source, "application/x-tar", _PATIENCE_SECONDS)
    except NobodyThereError:
        if where.url is not None:
            raise
    settings = _settings(where.config)
    return _take_here(source, settings.cache.directory, settings)


def _take_here(source: IO[bytes], directory: Path, settings: "Settings") -> dict[str, Any]:
    """Hold the locks that a service takes, so that none starts in between; StoreError when one runs."""
    import time

    from gup.cache.importing import Import
    from gup.errors import StoreError
    from gup.process.instance import Instance

    store = _store(directory)
    owner = store.content.stat().st_uid
    if owner != os.geteuid():
        raise StoreError(
            f"{directory} belongs to user {_name(owner)}, who could not use what another user puts there: "
            "run this as that user"
        )
    store.prepare()
    instance = Instance(store.run, wait_seconds=0.0)
    try:
        return asdict(Import(store, _custody(store, settings), time.time()).take(source))
    finally:
        instance.close()


def _custody(store: "Store", settings: "Settings") -> "Custody":
    """Nobody else is at work here: the claims are ours, and room is what the limits leave."""
    from gup.cache.importing import Custody
    from gup.cache.record import Record
    from gup.control.archives import no_room

    held = [sum(stored.size_bytes for stored in store.scan())]

    def room(length_bytes: int) -> str:
        figures = os.statvfs(store.root)
        return no_room(length_bytes, held[0], figures.f_bavail * figures.f_frsize, settings.cache)

    def taken(record: Record) -> None:
        held[0] += record.length

    return Custody(claim=lambda _: True, release=lambda _: None, room=room, taken=taken)


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _store(directory: Path) -> "Store":
    from gup.cache.store import Store
    from gup.errors import StoreError

    store = Store(directory)
    if not store.content.is_dir():
        raise StoreError(f"{directory} is no cache directory: it has no content/")
    return store


def _settings(config: Path | None) -> "Settings":
    from gup.config import load

    return load(config)


def _show_import(done: dict[str, Any]) -> None:
    from gup.units import bytes_in_words

    show_table(("refused", "why"), [(row["name"], row["why"]) for row in done["refused"]])
    if done["problem"]:
        typer.echo(done["problem"], err=True)
        sys.stderr.flush()
    typer.echo(
        f"{done['imported']} imported, {bytes_in_words(done['imported_bytes'])}; "
        f"{done['present']} were here already, {len(done['refused'])} refused"
    )
