"""The line in the log with which a fill ends, whatever its end; decides none."""

import logging

from gup.content.key import ContentKey

log = logging.getLogger("gup.fill")


def log_end(outcome: str, key: ContentKey, seconds: float, level: int = logging.INFO, **told: object) -> None:
    """`seconds` since the claim; `told` is what else there is to say of such an end."""
    given = {"outcome": outcome, "key": key.text, **told, "seconds": round(seconds, 6)}
    log.log(level, "fill", extra=given)
