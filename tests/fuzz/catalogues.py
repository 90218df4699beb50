"""ContentInfo.txt as an upstream may send it, and what the delivery rules make of its lines.

The first line is what a client states: its version, then after a tab its language.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuzz import Check
from gup.cache.catalog_cache import Kept, read_kept, write_kept
from gup.config import Settings
from gup.content.catalog import Catalogues, normal_moniker, parse_catalog, respelled
from gup.content.rules import Rulebook

_TABLES = [
    {"url": "http://a:1", "name": "a", "version": "14.3 RU2", "language": "French"},
    {"url": "http://b:1", "name": "b", "version": "14.3.558.0000", "language": "Chinese (Simplified)"},
]
_RULES = [{}, {"version_match": "build", "undeclared": "refuse", "unlisted": "refuse"}]


@contextmanager
def target() -> Iterator[Check]:
    """Any bytes are a catalogue: each row has a moniker, survives being kept for the workers, and gets a
    decision for any client.
    """
    settings = [Settings.model_validate({"upstream": _TABLES, "rules": rules}) for rules in _RULES]
    books = [(one, Rulebook(one)) for one in settings]
    with tempfile.TemporaryDirectory() as folder:

        def check(given: bytes) -> None:
            first, _, text = given.partition(b"\n")
            version, _, language = first.decode("latin-1").partition("\t")
            rows = parse_catalog(text)
            kept = {"a": Kept("http://a:1/content/ContentInfo.txt", rows, 1.0)}
            write_kept(Path(folder), kept)
            assert read_kept(Path(folder)) == kept
            for own, book in books:
                client = book.identities.read(
                    {"gup-client-version": version, "gup-client-language": language}.get
                )
                catalogues = Catalogues({"a": rows, "b": rows}, own.upstream, book.types)
                for origin in book.origins.values():
                    book.decide(None, origin, client)
                for moniker, row in rows.items():
                    assert normal_moniker(row.moniker) == moniker
                    assert catalogues.label(("14.3 RU2", "French", moniker)) is not None
                    assert catalogues.type_of(moniker) in book.types.names
                    catalogues.for_all_languages(moniker)
                    respelled(f"/content/%7B{moniker[1:-1].lower()}%7D/1/full.zip", row.moniker)
                    for origin in book.origins.values():
                        decision = book.decide(row, origin, client)
                        assert decision.because
                        standing = book.standing(row, origin)
                        assert standing is None or standing == decision

        yield check
