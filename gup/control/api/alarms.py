"""The alarms that stand. Ends none."""

from aiohttp import web

from gup.control.api.answers import PLANE, answer
from gup.control.api.described import Answer, describe
from gup.control.api.shapes import Alarm


class Alarms(Answer):
    """All that stand, the critical ones first."""

    alarms: list[Alarm]


@describe(Alarms)
async def alarms(request: web.Request) -> web.Response:
    """What an operator should look at now."""
    return answer({"alarms": request.app[PLANE].alarms.standing()})


routes = [web.get("/api/v1/alarms", alarms)]
