"""The index on disk: a diskcache of JSON texts. Blocking, for one thread; never trusts what it reads.

diskcache pickles whatever is not a plain type, and unpickles what a row's mode column tells it to
(CVE-2025-69872). `_TextDisk` takes both away: texts go in, texts come out, anything else is damage.
"""

import json
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diskcache

_FORMAT = 1
_FORMAT_KEY = "about:format"
_MODE_TEXT = 3  # diskcache's mode of a value kept as text in its row
BUSY_SECONDS = 5.0
"""How long another process' lock is waited for."""
_UNLIMITED_BYTES = 1 << 62
_REFUSALS = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
)
"""Errors that tell of the disk, or of another process, and not of the file."""


class DamagedIndexError(Exception):
    """The index can't be read as what was written. The remedy is to delete it: the records are the truth."""


class _TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Keys are texts, values JSON texts in the row; nothing is pickled or unpickled, no side file is made."""

    def put(self, key: object) -> tuple[str, bool]:
        assert isinstance(key, str)
        return key, True

    def get(self, key: object, raw: object) -> str:
        if not isinstance(key, str) or not raw:
            raise DamagedIndexError(f"a key is no text: {key!r:.60}")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        assert not read
        assert key is not None
        return 0, _MODE_TEXT, None, json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def fetch(self, mode: object, filename: object, value: object, read: object) -> Any:
        if mode != _MODE_TEXT or filename is not None or read or not isinstance(value, str):
            raise DamagedIndexError(f"a value is no text but of mode {mode!r:.20}")
        return json.loads(value)


class IndexFile:
    """The database in one folder. `load` opens it; every method belongs to the same one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None  # made by `_open`, in the thread that uses it

    def load(self) -> dict[str, Any] | None:
        """All values by key; None when there is no (complete) index yet.

        DamagedIndexError when it can't be read or is of another format; OSError when the folder is unusable.
        """
        try:
            self._open()
            return self._read()
        except (OSError, DamagedIndexError):
            raise
        except diskcache.Timeout as error:
            raise OSError(f"the index can't be opened: {_cause(error)}") from error
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in _REFUSALS:
                raise OSError(f"the index can't be opened: {error}") from error
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # whatever diskcache or sqlite make of damaged pages
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def _read(self) -> dict[str, Any] | None:
        found = self._cache.get(_FORMAT_KEY)
        if found is None:  # new, or never came to stand for the whole store
            self._cache.clear()
            return None
        if found != _FORMAT:
            raise DamagedIndexError(f"its format is {found!r:.20}")
        return {key: self._cache[key] for key in self._cache.iterkeys() if key != _FORMAT_KEY}

    def write(self, values: Mapping[str, Any], gone: Iterable[str], *, whole: bool) -> None:
        """Put `values` in and take `gone` out, in one transaction; opens the file when it is not open.

        `whole` says that the rows then stand for all of the store: only such an index is loaded again.
        OSError when the disk refuses for now, DamagedIndexError when the file is beyond use.
        """
        try:
            if self._cache is None:
                self._open()
            with self._cache.transact():  # a retry of diskcache's has no end, whatever the error
                for key, value in values.items():
                    self._cache[key] = value
                for key in gone:
                    self._cache.delete(key)
                if whole:
                    self._cache[_FORMAT_KEY] = _FORMAT
        except diskcache.Timeout as error:
            raise OSError(f"the index can't be written: {_cause(error)}") from error
        except sqlite3.OperationalError as error:  # full, read-only, I/O error
            raise OSError(f"the index can't be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DamagedIndexError(f"{type(error).__name__}: {error}") from error

    def delete(self) -> None:
        """Remove the whole index from the disk, to start anew; OSError when that fails."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=False)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._cache = diskcache.Cache(
            str(self._folder),
            timeout=BUSY_SECONDS,
            disk=_TextDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=_UNLIMITED_BYTES,
            statistics=0,
            tag_index=0,
            sqlite_mmap_size=0,  # a damaged or truncated file is an error to handle, not a SIGBUS
        )


def _cause(error: BaseException) -> BaseException:
    """What SQLite told: diskcache makes a `Timeout` of any error at which it could not begin."""
    while isinstance(error, diskcache.Timeout) and error.__context__ is not None:
        error = error.__context__
    return error


def check_index(folder: Path, *, repair: bool) -> str | None:
    """What is wrong with the index of a service that does not run; None when nothing is.

    `repair` removes a damaged one: it is made anew from the records.
    """
    if not folder.is_dir() or not list(folder.iterdir()):
        return None
    file = IndexFile(folder)
    try:
        file.load()
    except OSError as error:
        return str(error)
    except DamagedIndexError as error:
        if repair:
            file.delete()
        return f"it is damaged: {error}"
    finally:
        file.close()
    return None
