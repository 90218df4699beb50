"""Which parts of bodies clients were sent: one fetched in pieces is taken when all are there. No I/O."""

from collections import OrderedDict

Part = tuple[int, int]
_MOST = 20_000
_MOST_PARTS = 64


class Pieces:
    """Parts by client and key; those not added to for longest are forgotten."""

    def __init__(self, most: int = _MOST) -> None:
        self._parts: OrderedDict[tuple[str, str], list[Part]] = OrderedDict()
        self._most = most

    def add(self, client: str, key: str, start: int, stop: int, length: int) -> bool:
        """Note that the client was sent this part; whether it has the whole body now."""
        parts = merged([*self._parts.pop((client, key), []), (start, stop)])
        if parts == [(0, length)]:
            return True
        self._parts[client, key] = parts[-_MOST_PARTS:]
        while len(self._parts) > self._most:
            self._parts.popitem(last=False)
        return False


def merged(parts: list[Part]) -> list[Part]:
    """The same bytes as the fewest parts, in order."""
    found: list[Part] = []
    for start, stop in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
