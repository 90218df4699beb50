"""Where a test learns what is published and counted: management server, file, gup's control plane."""

import json
import os
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from gup.demo.content import (
    CATALOGUE_PATH,
    COUNTS_PATH,
    PUBLISH_PATH,
    Catalogue,
    NoCatalogueError,
    read_catalogue,
)
from gup.errors import GupError
from gup_load.figures import Counters

_TIMEOUT_SECONDS = 30.0


class NotThereError(GupError):
    """Something that the test needs is missing; the text names it, the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class Sources:
    """`manager` and `admin` are URLs without a slash at the end, `catalogue` is a file; each may be empty."""

    manager: str
    catalogue: str
    admin: str

    def published(self) -> Catalogue:
        """What clients can ask for, with lengths and sums. NotThereError if nobody tells."""
        url = self.manager + CATALOGUE_PATH
        try:
            if self.manager:
                return read_catalogue(_read(url))
            if self.catalogue:
                return read_catalogue(Path(self.catalogue).read_bytes())
        except (OSError, NoCatalogueError) as error:
            if self.manager:
                remedy = "--manager must name a running `gup simulate manager`"
                raise NotThereError(f"no catalogue at {url}: {error}; {remedy}") from error
            remedy = "docs/load.md tells how to make one"
            raise NotThereError(f"no catalogue in {self.catalogue}: {error}; {remedy}") from error
        raise NotThereError(
            "what is published is not known, so no body can be compared: name the simulated management "
            "server with --manager URL, or a catalogue with --catalogue FILE"
        )

    def publish(self, streams: int) -> None:
        """New revisions of the next so many streams, where a simulated management server can be told."""
        if self.manager:
            _read(f"{self.manager}{PUBLISH_PATH}?streams={streams}", method="POST")

    def fetches(self) -> dict[str, int] | None:
        """How often bytes of each file were fetched; None where nobody counts."""
        if not self.manager:
            return None
        files = json.loads(_read(self.manager + COUNTS_PATH))["files"]
        return {path: row["fetches"] for path, row in files.items()}

    def counters(self) -> Counters | None:
        """Gup's own; None where no control plane was named. NotThereError if it does not answer."""
        if not self.admin:
            return None
        url, token_file = f"{self.admin}/metrics", os.environ.get("GUP_TOKEN_FILE", "")
        try:
            text = _read(url, token=Path(token_file).read_text().strip() if token_file else "").decode()
        except OSError as error:
            remedy = "--admin must name gup's control plane, GUP_TOKEN_FILE its token where it needs one"
            raise NotThereError(f"no metrics at {url}: {error}; {remedy}") from error
        found: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name, sample.labels.get("purpose", "")] += int(sample.value)
        received = {purpose: count for (name, purpose), count in found.items() if name == _RECEIVED}
        return Counters(found[_SENT, ""], sum(received.values()), received.get("fill", 0))


_SENT, _RECEIVED = "gup_client_sent_bytes_total", "gup_upstream_received_bytes_total"


def _read(url: str, *, method: str = "GET", token: str = "") -> bytes:
    request = urllib.request.Request(url, method=method)  # noqa: S310 - the URLs were checked as options
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310 - as above
        body: bytes = response.read()
    return body
