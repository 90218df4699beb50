"""The line in the log with which a fill ends, whatever its end; decides none."""

import logging

from gup.content.key import ContentKey

log = logging.getLogger("gup.fill")


_USUAL = frozenset({"upstream-not-found", "upstream-gone"})
"""Upstream need not have what clients ask for: no reason to be warned."""


def log_end(outcome: str, key: ContentKey, seconds: float, **told: object) -> None:
    """`seconds` since the claim; `told` is what else there is to say of such an end."""
    good = outcome in ("stored", "validated") or told.get("problem") in _USUAL
    level = logging.INFO if good else logging.WARNING
    given = {"outcome": outcome, "key": key.text, **told, "seconds": round(seconds, 6)}
    log.log(level, "fill", extra=given)
