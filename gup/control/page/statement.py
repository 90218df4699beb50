"""The statement of a month: one HTML file that needs no other, for print, for those who pay the link."""

import base64
import hashlib
from datetime import date

from aiohttp import web

import gup
from gup.control.api.endpoint import Endpoint
from gup.control.api.months import MonthRequest, month_report
from gup.control.api.past_revisions import zone_of
from gup.control.page.live import PAGE
from gup.control.state import ControlState
from gup.control.stats.timeline import ACTIVE_SECONDS, DAY


async def statement(request: web.Request, state: ControlState, query: MonthRequest) -> web.Response:
    """A month's statement, as HTML."""
    report = await month_report(state, query)
    renderer = request.app[PAGE].renderer
    digest = base64.b64encode(hashlib.sha256(renderer.statement_css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    text = renderer.document(
        "statement",
        r=report,
        zone=zone_of(state),
        title=f"{date.fromisoformat(f'{report.month}-01'):%B %Y}",
        top=max((max(day.sent_bytes, day.received_bytes) for day in report.days), default=0),
        css=renderer.statement_css,
        policy=policy,
        active_days=ACTIVE_SECONDS // DAY,
        version=gup.__version__,
    )
    headers = {
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "Content-Disposition": f'inline; filename="gup-statement-{report.month}.html"',
    }
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


ENDPOINTS = (Endpoint("GET", "/api/v1/report/statement", statement, media=("text/html",), problems=(404,)),)
