"""The page in a real browser: its figures, its manners, what it makes of hostile names, who may use it."""

import contextlib
import json
import re
import signal
from urllib.parse import quote

import pytest
from harness.browser import Browser, browser
from harness.clients import RawConnection
from harness.content import INDEX, MONIKER, noise, zip_of
from harness.processes import until
from harness.upstreams import Answer, Gate

ATTACK = "<img src=x onerror=window.hit=1>"
PRODUCT = f"Virus <script>window.hit=1</script>\"'><b onclick=window.hit=1> {ATTACK}"
FULL = f"/content/{MONIKER}/260801001/full.zip"
SLOW = f"/content/{MONIKER}/260802001/slow.bin"
HOSTILE = "/content/" + quote(f"{ATTACK}/260801001/'\"><svg onload=window.hit=1>.dax", safe="/='")
MISSING = "/content/" + quote(f"{ATTACK}/260801001/not-there.dax", safe="/='")
ASK = b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n"

FIGURE = "const at = document.querySelector(arguments[0]); return at ? Number(at.value) : null"
TEXT = "return document.body.innerText"
FOCUS = """
const at = document.activeElement, style = getComputedStyle(at);
const known = window.reachedByTab ??= new Map();  // two links may read alike
if (!known.has(at)) known.set(at, known.size);
const what = at === document.body ? "" : `${known.get(at)}: ${at.outerHTML.slice(0, 60)}`;
return [what, style.outlineStyle, parseFloat(style.outlineWidth)]
"""
FAINT = """
// Text whose colour has less contrast to its ground than 4.5 : 1 (WCAG 2.2, 1.4.3), with the ratio.
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
function ground(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = parts(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
return [...document.querySelectorAll("body *")].filter((element) =>
  [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && element.offsetParent
).map((element) => {
  const [one, other] = [light(parts(getComputedStyle(element).color)), light(ground(element))];
  return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), element.outerHTML.slice(0, 80)];
}).filter(([ratio]) => ratio < 4.5)
"""
DRAWN = """
// How many colours are in each chart; an empty one has one.
return [...document.querySelectorAll('[id^="figure-"]:not([id*="sizing"]) canvas')].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
})
"""
NAMELESS = """
const used = "a, button, summary, progress, [tabindex='0'], table, section, figure, nav";
const named = (at) => ["aria-label", "aria-labelledby"].some((name) => at.getAttribute(name));
return [...document.querySelectorAll(used)]
  .filter((at) => !at.textContent.trim() && !named(at)).map((at) => at.outerHTML.slice(0, 80))
"""


@pytest.fixture
def site(serve):
    """A service with content of hostile names, and one fill that is held up half way with two who wait."""
    gate = Gate()
    catalogue = f"{MONIKER}: {PRODUCT} 14.3 RU2 - MicroDefsB.CurDefs - SymAllLanguages\r\n"
    bodies = {INDEX: catalogue.encode(), FULL: zip_of("full", 600_000), HOSTILE: noise("hostile", 50_000)}
    answers = {path: Answer(body) for path, body in bodies.items()}
    gup, _ = serve(
        {**answers, SLOW: Answer(noise("slow", 400_000), gates=((200_000, gate),))},
        each={"name": "head office", "health_interval": "0s", "give_up": "60s", "read_timeout": "50s"},
        wan={"rate": "900kB/s"},
        listen={"drain_timeout": "1s"},
        catalog={"refresh": "1h"},
        site={"name": "branch-7", "time_zone": "Pacific/Auckland"},
    )
    assert [gup.get(path).status for path in (FULL, FULL, HOSTILE, MISSING)] == [200, 200, 200, 404]
    gup.swarm().add(2, SLOW)
    gate.wait_reached()
    until(lambda: "Virus" in str(gup.api("/api/v1/content")[1]), "the catalogue is read")
    until(lambda: gup.status()["fill_waiters"] == 2, "two wait")
    until(lambda: [f["received_bytes"] for f in gup.status()["fills"]] == [200_000], "half of it is here")
    yield gup
    gate.open()


def figure(page: Browser, selector: str) -> float | None:
    return page.run(FIGURE, selector + " data")


@pytest.mark.needs("chromium")
def test_the_page(site):
    with browser() as page:
        page.look()
        page.open(site.admin_url + "/")
        check_figures(site, page)
        check_hostile_names(page)
        check_live(site, page)
        check_looks(page)
        check_keyboard(page)
        check_alarms(site, page)
        check_manners(site, page)
        check_without_script(site, page)
        check_listeners(site, page)


def check_figures(gup, page):
    """What is shown equals what the API tells, to the byte."""
    status = gup.status()
    totals = status["totals"]["since_install"]
    sent, received, saved = (
        totals[f"{name}_bytes"] for name in ("client_sent", "upstream_received", "saved")
    )
    assert sent >= 1_250_000
    until(lambda: figure(page, "#saved-install .sent") == sent, "the page has come so far")
    points = gup.api("/api/v1/history?span=day")[1]["points"]
    shown = {
        "#saved-install .big": saved,
        "#saved-install .received": received,
        "#saved-today .big": sum(point["saved_bytes"] for point in points),
        "#saved-30-days .sent": sum(point["client_sent_bytes"] for point in points),
        "#now-disk .mid": status["cache"]["size_bytes"],
        "#now-wan .dim": status["limits"]["wan_rate_bytes_per_second"]["limit"],
        "#fills .n": status["fills"][0]["received_bytes"],
    }
    assert {selector: figure(page, selector) for selector in shown} == shown
    assert (shown["#now-wan .dim"], shown["#fills .n"]) == (900_000, 200_000)
    text = page.run(TEXT)
    assert [w for w in ("1 under way, 2 requests wait", "branch-7", "head office") if w not in text] == []


def check_hostile_names(page):
    """They stand there as text, and are nothing else."""
    page.run("for (const stream of document.querySelectorAll('.stream')) stream.open = true")
    text = page.run(TEXT)
    assert text.count("onerror=window.hit=1") >= 3
    assert "<svg onload=window.hit=1>.dax" in text
    assert "<script>window.hit=1</script>" in text
    assert page.run("return window.hit") is None
    assert page.run("return document.querySelector('main img, main script, main [onclick], b')") is None


def check_live(gup, page):
    """New figures come by themselves, and what the user did to the page stays."""
    until(lambda: page.run("return document.getElementById('live').textContent") == "live", "it is live")
    page.run("window.mark = 1; document.querySelector('#hour-table').open = true")
    page.run(
        "document.querySelector('.stream').open = true; document.querySelector('.stream summary').focus()"
    )
    before = figure(page, "#saved-install .sent")
    for _ in range(3):
        assert len(gup.get(FULL).body) == 600_000
    wanted = before + 1_800_000
    until(lambda: figure(page, "#saved-install .sent") == wanted, "the page knows of three more downloads")
    until(lambda: figure(page, "#saved-today .sent") == wanted, "so do the days")
    assert page.run("return window.mark && document.querySelector('#hour-table').open")
    assert page.run("return document.activeElement === document.querySelector('.stream summary')")
    until(lambda: [colours > 3 for colours in page.run(DRAWN)] == [True] * 3, "the charts are drawn")
    assert page.run("return document.querySelectorAll('#days tr[data-day]').length") == 1


def check_looks(page):
    """Light and dark, wide and narrow: no text too faint, nothing beyond the edge."""
    grounds = set()
    for theme in ("light", "dark"):
        for width in (1280, 390, 320):
            page.look(width=width, theme=theme)
            fits = f"return document.documentElement.scrollWidth <= {width}"  # once charts have followed
            until(lambda fits=fits: page.run(fits), f"{theme}, {width}: nothing lies beyond the edge")
        grounds.add(page.run("return getComputedStyle(document.body).backgroundColor"))
        assert page.run(FAINT) == [], theme
    assert len(grounds) == 2
    page.look(motion="reduce")
    assert page.run("return getComputedStyle(document.body).transitionProperty") in ("none", "all")
    assert page.run("return getComputedStyle(document.querySelector('progress')).animationName") == "none"


def check_keyboard(page):
    """All that can be used is reached by Tab, is seen to be, and has a name; so have the landmarks."""
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    page.run("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(40):
        what, outline, width = page.run(FOCUS)
        if not what or what in reached:
            break
        assert outline == "solid", what
        assert width >= 2, what
        reached.append(what)
        page.press_tab()
    usable = page.run("return document.querySelectorAll('a, summary').length")
    assert len(reached) >= usable, reached
    assert page.run(NAMELESS) == []
    landmarks = "return ['header', 'main', 'footer', 'h1'].map((x) => document.querySelectorAll(x).length)"
    assert page.run(landmarks) == [1] * 4
    assert page.run("return document.querySelectorAll('table:not(.u-legend) th:not([scope])').length") == 0
    assert page.run("return document.documentElement.lang") == "en"


def check_alarms(gup, page):
    """What is wrong stands on top in the API's words, with what to do, and goes away by itself."""
    good = (gup.folder / "gup.toml").read_text()
    (gup.folder / "gup.toml").write_text(good + "[nonsense]\n")
    gup.signal(signal.SIGHUP)
    (alarm,) = until(lambda: gup.alarms("reload-failed"), "the reload is refused")
    text = "return document.getElementById('alarms').innerText"
    until(lambda: alarm["text"] in page.run(text), "the page tells of the alarm")
    assert alarm["what_to_do"] in page.run(text)
    assert page.run("return document.getElementById('alarms').getAttribute('role')") == "status"
    for theme in ("light", "dark"):
        page.look(theme=theme)
        assert page.run(FAINT) == [], theme
    (gup.folder / "gup.toml").write_text(good)
    gup.signal(signal.SIGHUP)
    until(lambda: alarm["text"] not in page.run(text), "all is well again")


def check_manners(gup, page):
    """It asked this service only, and its policy had nothing to keep it from."""
    asked = page.requests()
    assert len(asked) > 5
    assert all(url.startswith(gup.admin_url) for url in asked), asked
    assert {url.partition("?")[0].rpartition("/")[2] for url in asked} >= {"uPlot.iife.min.js", "events"}
    assert page.complaints() == []


def check_without_script(gup, page):
    def figures_are_there():
        page.allow_scripts(allowed=False)
        page.open(gup.admin_url + "/")
        page.allow_scripts(allowed=True)  # so that the test can look; the page's own have not run
        saved = gup.status()["totals"]["since_install"]["saved_bytes"]
        return figure(page, "#saved-install .big") == saved

    until(figures_are_there, "the figures of the moment at which it was loaded")
    assert page.run("return document.querySelectorAll('.plot canvas').length") == 0
    assert page.run("return document.getElementById('live').hidden")
    assert page.run("return document.querySelectorAll('#hour tbody tr').length") >= 1


def check_listeners(gup, page):
    """Everybody gets the same figures; one too many is told so; who has gone makes room.

    A stop ends them all, and the page then says that its figures are old.
    """
    with contextlib.ExitStack() as open_connections:
        listeners = []

        def all_listen():
            listener = open_connections.enter_context(RawConnection(gup.admin))
            listener.send(ASK)
            head = listener.head()
            if head.status == 200:
                listeners.append(listener)
                assert head.header("Content-Type") == "text/event-stream; charset=utf-8"
                assert head.header("Cache-Control") == "no-store"
                assert head.header("X-Content-Type-Options") == "nosniff"
            else:
                assert (head.status, head.header("Retry-After")) == (503, "10")
            return len(listeners) == 32

        until(all_listen, "all seats are taken, the browser's of before too")
        assert not listens(gup)
        found = [figures_at(listener) for listener in listeners[:2]]
        assert found[0].keys() == found[1].keys() >= {"saved_today_bytes", "wan_bytes_per_second", "fills"}
        assert found[0]["fills"] == 1
        for listener in listeners[:4]:
            listener.close()
        until(lambda: listens(gup), "there is room again")
        page.open(gup.admin_url + "/")
        live = "return document.getElementById('live').textContent"
        until(lambda: page.run(live) == "live", "it is live, at its second try at the latest", 25)
        assert gup.stop() == 0
        assert all(listener.rest().endswith(b"0\r\n\r\n") for listener in listeners[4:])
    until(lambda: "no answer" in page.run(live), "the page tells that it is old")
    assert figure(page, "#saved-install .sent") >= 3_000_000


def figures_at(listener):
    """The first figures that a listener is sent."""
    wanted = re.compile(rb"event: figures\ndata: (.+)\n\n")
    got = bytearray()
    while not (found := wanted.search(got)):
        got += listener.read(1)
    return json.loads(found[1])


def listens(gup):
    with RawConnection(gup.admin) as listener:
        listener.send(ASK)
        return listener.head().status == 200
