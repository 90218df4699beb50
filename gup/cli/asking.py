"""How a command gets at a running service's control plane; asks it nothing itself."""
# ruff: noqa: PLC0415 - what is heavy is imported when a command is run

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gup.cli.complaining import complaining
from gup.cli.options import ConfigFlag

if TYPE_CHECKING:
    from gup.cli.admin import Admin


@contextmanager
def asking(url: str | None, config: ConfigFlag = None) -> Iterator["Admin"]:
    """The control plane at `url`, else where the settings put it; its refusals become sentences."""
    with complaining():
        from gup.cli.admin import Admin, AdminError, admin_url

        if url is None:
            from gup.config import load

            url = admin_url(load(config))
        try:
            yield Admin(url)
        except KeyError as error:
            raise AdminError(f"{url}: the answer has no {error}: that gup is of another version") from error
