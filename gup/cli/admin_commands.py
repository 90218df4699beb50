"""`gup status`, `why`, `reload`, `upgrade`, `prefetch`, `hold`, `alarms`: asked of a running service."""

import getpass
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from gup.cli.shared import (
    FAILED,
    UNUSABLE,
    WAITING,
    Columns,
    Commands,
    JsonFlag,
    Row,
    Where,
    asking,
    print_json,
    printable,
    show_table,
    with_connection_flags,
)
from gup.units import bytes_in_words, format_rate, time_in_words

if TYPE_CHECKING:
    from gup.cli.admin_client import Admin

_POLL_SECONDS = 0.2
_TEST_SECONDS = 600.0
"""More than alarms.webhook_timeout and alarms.command_timeout, which end a test."""
_UPGRADE_SECONDS = 45.0
_PENDING = ("queued", "fetching")
_HELD_BACK = "held back by the WAN's budget"
"""As gup.control.prefetch says it."""
_OUTCOMES = {
    "queued": "waits",
    "fetching": "is being fetched",
    "stored": "fetched and stored",
    "present": "stored already",
    "absent": "NOT FOUND: no upstream has it",
    "failed": "FAILED",
    "superseded": "not fetched: superseded",
}
_GOOD = ("stored", "present", *_PENDING)


@with_connection_flags
def status(*, where: Where, json_output: JsonFlag = False) -> None:
    """Show what a running service saved, keeps and does."""
    with asking(where) as admin:
        answer = admin.ask("GET", "status")
        if json_output:
            print_json(answer)
            return
        for line in status_lines(answer):
            typer.echo(line)
        if answer["cluster"] is not None:
            members = (*answer["cluster"]["members"], *answer["cluster"]["gone"])
            show_table(_MEMBERS, members)
            show_table(_MOVED, members)
        show_table(_UPSTREAMS, answer["upstreams"])
        show_table(_FILLS, answer["fills"])
        failures = answer["failures"]
        show_table(_FAILURES, ({**row, "failed_at": row["at"]} for row in failures[:_FAILURES_SHOWN]))
        if (more := len(failures) - _FAILURES_SHOWN) > 0:
            typer.echo(f"and {more} more: gup status --json; gup why KEY explains one")


def status_lines(status: Row) -> Iterator[str]:
    cache = status["cache"]
    ready = "ready" if status["ready"] else "not ready"
    up = time_in_words(status["uptime_seconds"])
    yield f"gup {status['version']} at {status['site']}: {ready}, up {up}"
    for since in ("since_install", "since_start"):
        totals = status["totals"][since]
        sent, saved, ratio = totals["client_sent_bytes"], totals["saved_bytes"], totals["hit_ratio"]
        share = f" ({saved / sent:.1%})" if sent else ""
        hits = f", {ratio:.1%} hits" if ratio is not None else ""
        got = bytes_in_words(totals["upstream_received_bytes"])
        flow = f"{bytes_in_words(sent)} to clients, {got} over the WAN, {bytes_in_words(saved)} saved"
        yield f"{since.replace('_', ' ')}: {flow}{share}{hits}"
    size, limit, free = (bytes_in_words(cache[name]) for name in ("size_bytes", "limit_bytes", "free_bytes"))
    yield f"cache: {cache['entries']} entries, {size} of {limit}, {free} free on disk"
    rate = (status["cluster"] or status)["wan_rate_bytes_per_second"]
    yield f"WAN: {format_rate(rate) if rate else 'unlimited'}"
    if (cluster := status["cluster"]) is not None:
        yield printable(cluster_line(cluster))
        yield site_line(cluster["sums"])
    recent, clients = status["totals"]["since_start"], status["clients"]
    by_result = ", ".join(f"{count} {result}" for result, count in recent["requests"].items() if count)
    yield f"requests since start: {recent['requests_total']}" + (f" ({by_result})" if by_result else "")
    seen = ", ".join(f"{count} in {window}" for window, count in clients["seen"].items())
    now = status["started_at"] + status["uptime_seconds"]
    last = ", ".join(
        f"{client['address']} ({time_in_words(max(0, now - client['seen_at']))} ago)"
        for client in clients["latest"]
    )
    yield printable(
        f"clients: {clients['connections']} connections; seen: {seen}" + (last and f"; the last: {last}")
    )
    if status["budget"] is not None:
        yield f"WAN budget: {status['budget']['saying']}"
    if status["outbreak"] is not None:
        yield printable(outbreak_line(status["outbreak"]))
    for row in status["holds"]:
        yield printable(f"ON HOLD: {hold_line(row)}")
    for row in status["canary"]:
        yield printable(f"NEW: {new_line(row)}")
    if not status["reload"]["successful"]:
        yield "the last reload FAILED: the old settings are in force; `gup config check` lists the mistakes"
    for alarm in status["alarms"]:
        words = f"{alarm['severity'].upper()} {alarm['name']}: {alarm['text']}. {alarm['what_to_do']}"
        yield printable(words)


def cluster_line(cluster: Row) -> str:
    """`cluster lyon: gup-1 with gup-2, gup-3 (not asked); ...`"""
    others = [
        member["name"] + ("" if member["askable"] else " (not asked)")
        for member in cluster["members"]
        if member["name"] != cluster["node"]
    ]
    (share,) = (row["share_bytes_per_second"] for row in cluster["members"] if row["name"] == cluster["node"])
    words = f"cluster {cluster['site']}: {cluster['node']} with {', '.join(others) or 'no other member'}"
    if (rate := cluster["wan_rate_bytes_per_second"]) is not None:
        part = f"{format_rate(share)} of it" if share is not None else "no share of it granted"
        words += f"; the site's WAN rate is {format_rate(rate)}, {part} here"
    error = cluster["engine_error"]
    return words + (f"; the engine does NOT answer ({error})" if error else "")


def site_line(sums: Row) -> str:
    """`all gups: 3.0 MB to clients, ...`; what one sent another is neither WAN bytes nor saved."""
    sent, saved = sums["sent_bytes"], sums["saved_bytes"]
    got, between = (bytes_in_words(sums[f"{name}_bytes"]) for name in ("received", "between_members"))
    flow = f"{bytes_in_words(sent)} to clients, {got} over the WAN, {bytes_in_words(saved)} saved"
    return f"all gups: {flow}{f' ({saved / sent:.1%})' if sent else ''}, {between} from one to another"


def _member_state(member: Row) -> str:
    if "left" in member:
        word = "stopped" if member["left"] else "GONE"
        return f"{word} {time_in_words(member['gone_seconds'])} ago"
    state, age = member["state"], member["told_seconds"] or 0
    word = state if state == "ready" else f"{state.upper()}: {member['detail']}"
    return word + (f", figures of {time_in_words(age)} ago" if age >= _OLD_SECONDS else "")


def _orders(member: Row) -> str:
    count = member.get("unconfirmed_orders")
    return "-" if count is None else f"{count} unconfirmed" if count else "confirmed"


def _moved(way: str) -> Callable[[Row], str]:
    return lambda member: bytes_in_words(member["totals"].get(f"gup_{way}_bytes_total", 0))


def _share(member: Row) -> str:
    share = member.get("share_bytes_per_second")
    return "-" if share is None else format_rate(share)


_OLD_SECONDS = 3.0
_MEMBERS: Columns = {
    "member": "name",
    "state": _member_state,
    "orders": _orders,
    "address": "address",
}
_MOVED: Columns = {
    "member": "name",
    "#WAN share": _share,
    "#to clients": _moved("client_sent"),
    "#over the WAN": _moved("upstream_received"),
    "#from members": _moved("peer_received"),
    "#to members": _moved("peer_sent"),
}
"""Beside the one above, a table of its own: both fit a terminal of 80 columns."""


def _state(upstream: Row) -> str:
    state = str(upstream["state"])
    return "up" if upstream["up"] and state == "unknown" else state if upstream["up"] else state.upper()


def _received(fill: Row) -> str:
    received, length = fill["received_bytes"], fill["length_bytes"]
    share = "" if length is None else f" of {bytes_in_words(length)} ({received / length:.0%})"
    return bytes_in_words(received) + share


_UPSTREAMS: Columns = {"upstream": "name", "": _state, "since": "since", "last error": "last_error"}
_FAILURES_SHOWN = 5
_FAILURES: Columns = {
    "last failures": "failed_at",
    "problem": "problem",
    "detail": "detail",
    "content": "key",
}
_FILLS: Columns = {
    "fill": lambda fill: fill["key"] or fill["id"],
    "from": "upstream",
    "#received": _received,
    "#rate": "bytes_per_second",
    "#time left": "remaining_seconds",
}


@with_connection_flags
def why(
    of: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="A key, a path such as /content/{MONIKER}/260101001/full.zip, a URL, or a client's address.",
        ),
    ],
    *,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Tell what is known of one file; status 0 if it is stored, 1 if not.

    Where it came from and who took it, or why it is not stored: its last failure, the queue that it waits in,
    the rule that refuses it. Where the seconds of its fill and of slow requests went. Of a client: where the
    seconds of its slow requests went; status 0.
    """
    with asking(where) as admin:
        answer = admin.ask("GET", "why?" + urlencode({"of": of}))
    if json_output:
        print_json(answer)
    else:
        for file in answer["files"]:
            typer.echo("\n  ".join(map(printable, (file["key"], *file["said"]))))
        if answer.get("client") is not None:
            said = [spell["said"] for spell in answer["slow"]] or ["No slow request of it is known."]
            typer.echo("\n  ".join(map(printable, (answer["client"], *said))))
    if answer.get("client") is None and not any(file["stored"] for file in answer["files"]):
        raise typer.Exit(FAILED)


@with_connection_flags
def reload(*, where: Where, json_output: JsonFlag = False) -> None:
    """Have a running service read its settings again, and say what took effect.

    Status 1 when the settings can't be used: those before stay in force. Status 3 when some of them need a
    restart: the port, the cache directory. Another number of workers is started beside those before, which
    finish their responses: no request fails.
    """
    with asking(where) as admin:
        answer = admin.ask("POST", "reload")
        changed, waiting = answer["changed"], answer["waiting"]
    if json_output:
        print_json(answer)
    elif not answer["reloaded"]:
        typer.echo("\n  ".join(["the old settings stay in force:", *answer["problems"]]), err=True)
    else:
        typer.echo(f"in force now: {', '.join(changed)}" if changed else "nothing has changed")
        if waiting:
            typer.echo(f"restart the service for: {', '.join(waiting)}")
    if not answer["reloaded"] or waiting:
        raise typer.Exit(WAITING if answer["reloaded"] else FAILED)


@with_connection_flags
def upgrade(*, where: Where, json_output: JsonFlag = False) -> None:
    """Have a running service run the version of gup that is installed now; no request fails.

    The service keeps its process and its sockets. New processes start beside those before, which finish their
    responses. Status 1 when the new version can't take over, and says why: the old one goes on.
    """
    with asking(where) as admin:
        answer = admin.ask("POST", "upgrade", patience_seconds=_UPGRADE_SECONDS)
        status = _replaced(admin, answer) if answer["upgraded"] else None
        problems = answer["problems"]
        if answer["upgraded"] and status is None:
            late = f"the new processes were not ready within {_UPGRADE_SECONDS:g} s; the log says why"
            problems = [late]
        leaving = 0 if status is None else sum(worker["leaving"] for worker in status["workers"])
        serving = 0 if status is None else len(status["workers"]) - leaving
    if json_output:
        version = None if status is None else status["version"]
        print_json({"upgraded": not problems, "problems": problems, "version": version, "leaving": leaving})
    elif status is None:
        typer.echo("\n  ".join(["the earlier processes go on serving:", *problems]), err=True)
    else:
        workers = "1 new worker" if serving == 1 else f"{serving} new workers"
        ones = "1 earlier one finishes its" if leaving == 1 else f"{leaving} earlier ones finish their"
        rest = f"; {ones} responses" if leaving else ""
        typer.echo(f"gup {status['version']} serves with {workers}{rest}")
    if problems:
        raise typer.Exit(FAILED)


def _replaced(admin: "Admin", before: dict[str, Any]) -> dict[str, Any] | None:
    """The status that the new controller tells when all of its workers are ready; None if that takes long."""
    from gup.cli.admin_client import AdminError  # noqa: PLC0415 - the other commands start without

    give_up_at = time.monotonic() + _UPGRADE_SECONDS
    while time.monotonic() < give_up_at:
        with suppress(AdminError):  # the controller is being replaced
            status = admin.ask("GET", "status")
            current = [worker for worker in status["workers"] if not worker["leaving"]]
            if status["pid"] != before["pid"] and current and all(worker["ready"] for worker in current):
                return status
        time.sleep(_POLL_SECONDS)
    return None


@with_connection_flags
def prefetch(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Such as /content/{MONIKER}/260101001/full.zip."),
    ] = None,
    *,
    product: Annotated[
        str | None,
        typer.Option(metavar="PRODUCT", help="Its newest full packages; named as by `gup cache list`."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Only from upstreams of this version; default: all."),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="LANGUAGE", help="Only from upstreams of this language; default: all."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Queue it and return at once with status 0.")
    ] = False,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Fetch content before clients request it, and wait; status 0 when all is stored, else 1.

    It is fetched while no client's fill needs the link, within wan.rate. Ctrl-C ends only the wait. In a
    cluster each node fetches it, once over the WAN; the wait is for the node that is asked.
    """
    given = {"version": version, "language": language}
    order = {name: value for name, value in given.items() if value is not None}
    orders = [{"path": path} for path in paths or ()] + ([{"product": product}] if product else [])
    if not orders:
        typer.echo("gup: give paths or --product", err=True)
        raise typer.Exit(UNUSABLE)
    with asking(where) as admin:
        answers = [admin.ask("POST", "prefetch", each | order) for each in orders]
        wanted = [row for answer in answers for row in answer["wanted"]]
        for words in {without(answer).removeprefix("; ") for answer in answers} - {""}:
            typer.echo(printable(f"gup: {words}"), err=True)
        if not no_wait:
            wanted = _wait(admin, wanted)
    if json_output:
        print_json({"wanted": wanted})
    else:
        for row in wanted:
            detail = f" ({row['detail']})" if row["detail"] else ""
            typer.echo(printable(f"{row['key']}: {_OUTCOMES.get(row['outcome'], row['outcome'])}{detail}"))
    if not all(row["outcome"] in _GOOD for row in wanted):
        raise typer.Exit(FAILED)


Stream = Annotated[
    str, typer.Argument(metavar="STREAM", help="The moniker, or a product as `gup cache list` shows it.")
]
Revision = Annotated[str, typer.Argument(metavar="REVISION", help="Such as 260101001.")]


@with_connection_flags
def hold(
    stream: Stream,
    revision: Revision,
    *,
    except_: Annotated[
        list[str] | None,
        typer.Option("--except", metavar="SUBNET", help="Clients in it may have it; may be repeated."),
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Told to the clients.")] = "",
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who orders it; default: your user's name.")
    ] = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Keep a revision from clients, on all nodes of a cluster, until it is released.

    Responses under way are sent to their end. Clients may go round this service if their policy lets them.
    """
    for subnet in except_ or []:  # the service would take it for the whole network
        with suppress(ValueError):
            given_as = ip_interface(subnet)
            if given_as.ip != given_as.network.network_address:
                right = f"{given_as.network}, or {given_as.ip} for that client alone"
                raise typer.BadParameter(f"{subnet} is no network: give {right}", param_hint="--except")
    given: dict[str, object] = {"stream": stream, "revision": revision, "reason": reason}
    given |= {"by": _user() if by is None else by, "except_subnets": except_ or []}
    with asking(where) as admin:
        _show_holds(admin.ask("POST", "holds", given), "on hold", json_output=json_output)


@with_connection_flags
def release(stream: Stream, revision: Revision, *, where: Where, json_output: JsonFlag = False) -> None:
    """Let all clients have a revision that is on hold, or that is new and waits (rules.canary)."""
    query = urlencode({"stream": stream, "revision": revision})
    with asking(where) as admin:
        _show_holds(admin.ask("DELETE", f"holds?{query}"), "released", json_output=json_output)


@with_connection_flags
def holds(*, where: Where, json_output: JsonFlag = False) -> None:
    """List the revisions on hold: who ordered it, when and why; and new ones that only some clients get."""
    with asking(where) as admin:
        answer = admin.ask("GET", "holds")
    if json_output:
        print_json(answer)
        return
    if answer["holds"]:
        show_table(_HOLDS, answer["holds"])
    else:
        typer.echo("nothing is on hold", err=True)
    for row in answer["canary"]:
        typer.echo(printable(f"new: {new_line(row)}"))


_HOLDS: Columns = {
    "product": "product",
    "revision": "revision",
    "since": "held_at",
    "by": "held_by",
    "reason": "reason",
    "except": lambda row: ", ".join(row["except_subnets"]) or "-",
    "newest": "newest",
    "stream": "stream",
}


def _user() -> str:
    with suppress(OSError, KeyError, ImportError):  # no such user, as in a container
        return getpass.getuser()
    return ""


def _show_holds(answer: Row, what: str, *, json_output: bool) -> None:
    if json_output:
        print_json(answer)
        return
    late = without(answer)
    for row in answer["holds"]:
        typer.echo(printable(f"{what}: {hold_line(row)}{late}"))
    for row in answer["canary"]:
        typer.echo(printable(f"open to all: {row['product']} {row['revision']}{late}"))


def hold_line(row: Row) -> str:
    """`Virus Definitions 260801002, since 2026-08-01 14:05, by ann: crashes clients`"""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["held_at"]))
    besides = f", except for {', '.join(row['except_subnets'])}" if row["except_subnets"] else ""
    who = f", by {row['held_by']}" if row["held_by"] else ""
    why = row["reason"] or "no reason given"
    return f"{row['product']} {row['revision']}{besides}, since {since}{who}: {why}"


def new_line(row: Row) -> str:
    """`Virus Definitions 260801002, first to 10.1.2.0/24, to all from 2026-08-01 14:05`"""
    opens = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["opens_at"]))
    return f"{row['product']} {row['revision']}, first to {', '.join(row['first'])}, to all from {opens}"


@with_connection_flags
def budget(*, where: Where, json_output: JsonFlag = False) -> None:
    """Show the WAN's budget: what is used of it, what is held back, and when it runs out."""
    with asking(where) as admin:
        answer = admin.ask("GET", "budget")
        if json_output:
            print_json(answer)
            return
        for line in budget_lines(answer):
            typer.echo(line)
        if len(answer["nodes"]) > 1:
            show_table({"gup": "node", "#used": "used_bytes", "told": "told_at"}, answer["nodes"])


def budget_lines(answer: Row) -> Iterator[str]:
    began, ends = (
        time.strftime("%Y-%m-%d %H:%M", time.localtime(answer[name]))
        for name in ("period_began_at", "period_ends_at")
    )
    yield answer["saying"]
    left = answer["left_bytes"]
    yield f"period: {began} to {ends}" + ("" if left is None else f", {bytes_in_words(left)} left")
    kinds = ", ".join(f"{bytes_in_words(count)} {kind}" for kind, count in answer["by_kind"].items())
    yield f"received in it: {kinds}; {bytes_in_words(answer['background_bytes'])} of them prefetched"
    if answer["cheap_bytes"] or answer["cheap_now"]:
        now = ", now" if answer["cheap_now"] else ""
        yield f"in cheap hours, not counted: {bytes_in_words(answer['cheap_bytes'])}{now}"
    ahead = answer["forecast"]
    if ahead["basis"] == "none":
        yield "forecast: too early to tell"
    else:
        judged = "this period alone"
        if ahead["basis"] != "period":
            judged = f"{'the weekdays of ' if ahead['basis'] == 'weekdays' else ''}{ahead['days']} days"
        expected = bytes_in_words(ahead["expected_bytes"])
        yield f"forecast: {expected} at the period's end, judged by {judged}"
    counts = ", ".join(f"{count} {class_}" for class_, count in answer["held_back_total"].items())
    yield f"held back since the installation: {counts}; now: {', '.join(answer['held_back']) or 'nothing'}"


@with_connection_flags
def outbreak(
    what: Annotated[
        str | None,
        typer.Argument(metavar="TIME", help="How long, such as 4h, at most 7d; or end. Default: show it."),
    ] = None,
    *,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Shown wherever the outbreak is.")] = "",
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who orders it; default: your user's name.")
    ] = None,
    where: Where,
    json_output: JsonFlag = False,
) -> None:
    """Open everything for definitions for some hours, on all nodes of a cluster; it ends by itself.

    The WAN's budget holds no definitions back, they are prefetched at once, and lower rates of the WAN's
    schedule do not apply. Client patches are not opened. Without an argument: whether there is an outbreak.
    """
    given = {"by": _user() if by is None else by}
    with asking(where) as admin:
        if what is None:
            answer = admin.ask("GET", "outbreak")
        elif what == "end":
            answer = admin.ask("DELETE", f"outbreak?{urlencode(given)}")
        else:
            answer = admin.ask("POST", "outbreak", given | {"duration": what, "reason": reason})
    if json_output:
        print_json(answer)
        return
    found = answer["outbreak"]
    words = outbreak_line(found) if found else "the outbreak is over" if what else "there is no outbreak"
    typer.echo(printable(words + without(answer)))


def outbreak_line(row: Row) -> str:
    """`OUTBREAK until 2026-08-01 18:05, 3 h 59 min left, by ann: worm`"""
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["until"]))
    who = f", by {row['by']}" if row["by"] else ""
    left, why = time_in_words(row["left_seconds"]), row["reason"] or "no reason given"
    return f"OUTBREAK until {until}, {left} left{who}: {why}; the WAN is open for definitions"


def without(answer: Row) -> str:
    """The members of the cluster that have not confirmed it."""
    names = ", ".join(answer.get("unconfirmed", ()))
    return f"; not confirmed yet by {names}" if names else ""


def _wait(admin: "Admin", wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Poll until no row is pending; returns the rows."""
    said = False
    while any(row["outcome"] in _PENDING for row in wanted):
        time.sleep(_POLL_SECONDS)
        listed = {row["key"]: row for row in admin.ask("GET", "prefetch?limit=1000")["wanted"]}
        gone = {"outcome": "failed", "detail": "it is no longer in the service's queue"}
        wanted = [listed.get(row["key"], row | gone) for row in wanted]
        held = [row for row in wanted if row["outcome"] == "queued" and row["detail"] == _HELD_BACK]
        if held and not said:
            said = True
            typer.echo(
                f"gup: {len(held)} of them are {_HELD_BACK}: see gup budget; Ctrl-C ends the wait", err=True
            )
    return wanted


alarms = typer.Typer(cls=Commands, help="Send alarms to a webhook or a command.", no_args_is_help=True)


@alarms.callback()
def _alarms() -> None:
    """Keeps `test` a command of its own: typer would fold a single one into `gup alarms`."""


@alarms.command("test")
@with_connection_flags
def send_test(*, where: Where, json_output: JsonFlag = False) -> None:
    """Send a test message to alarms.webhook and alarms.command; status 0 when all accept it, else 1."""
    with asking(where) as admin:
        answer = admin.understood(admin.pieces("POST", "alarms/test", patience_seconds=_TEST_SECONDS))
        sent = answer["sent"]
    if json_output:
        print_json(answer)
    else:
        for row in sent:
            result = "accepted" if row["accepted"] else "NOT ACCEPTED"
            typer.echo(printable(f"alarms.{row['to']}: {result}" + (row["detail"] and f": {row['detail']}")))
    if not all(row["accepted"] for row in sent):
        raise typer.Exit(FAILED)
