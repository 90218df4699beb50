"""A decision of the rules as a problem for the client, as JSON, as lines for people; decides nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from gup.content.decision import Action, Decision, Fit
from gup.content.identity import Client
from gup.errors import Problem


def problem(decision: Decision, liveupdate_url: str | None) -> Problem:
    """The 403 for a client that was refused, with a Link to the LiveUpdate server where that is a way out."""
    assert decision.rule is not None, "only a refusal is a problem"
    extensions: dict[str, object] = {
        "rule": str(decision.rule),
        "client": _stated(decision.client),
        "fits": _stated(decision.fits),
        "remedies": _remedies(decision, liveupdate_url),
    }
    if decision.notes:
        extensions["notes"] = list(decision.notes)
    ways_out = " ".join(remedy.text for remedy in decision.remedies)
    detail = f"{decision.because[:1].upper()}{decision.because[1:]}. {ways_out}"
    points = liveupdate_url is not None and _by_liveupdate(decision)
    headers = (("Link", f'<{liveupdate_url}>; rel="alternate"'),) if points else ()  # RFC 8288
    return Problem("rule-refused", detail, headers=headers, extensions=extensions)


def document(decision: Decision, liveupdate_url: str | None) -> dict[str, Any]:
    """The decision for programs."""
    return {
        "allowed": decision.allowed,
        "rule": None if decision.rule is None else str(decision.rule),
        "because": decision.because,
        "type": decision.type or None,
        "client": _stated(decision.client),
        "fits": _stated(decision.fits),
        "remedies": _remedies(decision, liveupdate_url),
        "notes": list(decision.notes),
    }


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """A `document` for people."""
    verdict = "allowed" if told["allowed"] else f"refused by the rule {told['rule']}"
    yield f"{verdict}: {told['because']}"
    if told["type"]:
        yield f"type of content: {told['type']}"
    fits = told["fits"]
    if any(fits.values()):
        yield f"fits: version {fits['version'] or 'any'}, language {fits['language'] or 'any'}"
    for remedy in told["remedies"]:
        yield f"remedy: {remedy['text']}" + (f" ({remedy['url']})" if "url" in remedy else "")
    for note in told["notes"]:
        yield f"note: {note}"


def _by_liveupdate(decision: Decision) -> bool:
    return any(remedy.action is Action.LIVEUPDATE for remedy in decision.remedies)


def _remedies(decision: Decision, liveupdate_url: str | None) -> list[dict[str, str]]:
    told = [{"action": str(remedy.action), "text": remedy.text} for remedy in decision.remedies]
    for remedy in told:
        if remedy["action"] == Action.LIVEUPDATE and liveupdate_url is not None:
            remedy["url"] = liveupdate_url
    return told


def _stated(who: Client | Fit) -> dict[str, str | None]:
    return {
        "version": None if who.version is None else str(who.version),
        "language": None if who.language is None else str(who.language),
    }
