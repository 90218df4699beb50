"""What the rules decide for one client and stream, at each upstream, and why: for people and programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from gup import config
from gup.content.catalogues import Catalogues
from gup.content.choice import Choices
from gup.content.identity import Client
from gup.content.refusal import document, lines
from gup.content.rulebook import Rulebook


def explain(
    book: Rulebook,
    catalogues: Catalogues,
    upstreams: Sequence[config.Upstream],
    sources: Mapping[str, str],
    moniker: str,
    client: Client,
) -> dict[str, Any]:
    """The document that `gup rules explain --json` and the API give; `explained` makes lines of it.

    `moniker` is in braces and upper case. `sources` tell by the upstream's name where its catalogue was read.
    `served_from` is the upstream that the service would choose for the client, of those with content; None
    where it would refuse, or has none.
    """
    choices = Choices(book, catalogues, upstreams)
    choice = choices.choose_for(moniker, client) if choices.any_place else None
    answers = [
        _answer(book, catalogues, upstream.name, sources.get(upstream.name, "not read yet"), moniker, client)
        for upstream in upstreams
    ]
    # LiveUpdate serves everybody, but not under /content/: where there are managers, they decide.
    kinds = {upstream.name: upstream.kind for upstream in upstreams}
    managers = [answer for answer in answers if kinds[answer["upstream"]] != "liveupdate"]
    return {
        "moniker": moniker,
        "mode": book.mode,
        "allowed": any(answer["allowed"] for answer in managers or answers),
        "served_from": None if choice is None or choice.refused else choice.upstream,
        "decisions": answers,
        "client_notes": list(client.notes),
    }


def _answer(
    book: Rulebook, catalogues: Catalogues, upstream: str, source: str, moniker: str, client: Client
) -> dict[str, Any]:
    listed = catalogues.listed(upstream, moniker)
    decision = book.rules.decide(listed, book.origins[upstream], client)
    return {
        "upstream": upstream,
        "catalogue": source,
        "product": None if listed is None else listed.product,
        "product_language": None if listed is None else listed.language or None,
        "refused": book.refuses(decision),
        **document(decision, book.liveupdate_url),
    }


def explained(told: Mapping[str, Any]) -> list[str]:
    """An explanation for people."""
    out = [f"{told['moniker']}: {'allowed' if told['allowed'] else 'refused'}"]
    if told["mode"] != "enforce":
        out[0] += f' (rules.mode is "{told["mode"]}": nothing is refused)'
    if told["served_from"] is not None and len(told["decisions"]) > 1:
        out[0] += f", from {told['served_from']}"
    out += [f"note: {note}" for note in told["client_notes"]]
    for answer in told["decisions"]:
        out += ["", f"from {answer['upstream']}"]
        out.append(f"  product: {answer['product'] or 'not listed'} (catalogue: {answer['catalogue']})")
        out += [
            f"  {line}" for line in lines(answer) if line.removeprefix("note: ") not in told["client_notes"]
        ]
    return out
