"""From flags and settings to the control plane that is asked: URL, token, whom to trust. Asks nothing."""
# ruff: noqa: PLC0415 - a command's imports stand in it, so that the others start quickly

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gup.cli.complaining import complaining

if TYPE_CHECKING:
    from gup.cli.admin import Admin, Credentials
    from gup.config import Settings


@dataclass(frozen=True, slots=True)
class Where:
    """What the flags say of the control plane. Without a `url` the settings tell where it is."""

    url: str | None = None
    config: Path | None = None
    token_file: Path | None = None
    ca_file: Path | None = None


@contextmanager
def asking(where: Where) -> Iterator["Admin"]:
    """The control plane; its refusals become sentences and an exit status."""
    with complaining():
        from gup.cli.admin import AdminError

        admin = admin_at(where)
        try:
            yield admin
        except KeyError as error:
            raise AdminError(
                f"{admin.url}: the answer has no {error}: that gup is of another version"
            ) from error


def admin_at(where: Where) -> "Admin":
    """The control plane that the flags mean; SettingsError or AdminError when they mean none."""
    from gup.cli.admin import Admin, admin_url

    settings = None
    if where.url is None or where.config is not None:
        from gup.config import load

        settings = load(where.config)
    if where.url is None:
        assert settings is not None
        return Admin(admin_url(settings), _credentials(where, settings))
    return Admin(where.url, _credentials(where, settings, named=True))


def _credentials(where: Where, settings: "Settings | None", *, named: bool = False) -> "Credentials":
    from gup.cli.admin import Credentials

    token, lack = _token(where, settings)
    pinned = settings.listen.admin_cert_file if settings is not None and not named else None
    return Credentials(token, lack, where.ca_file, pinned if where.ca_file is None else None)


def _token(where: Where, settings: "Settings | None") -> tuple[str, str]:
    """The token, and why there is none."""
    from gup.cli.admin import AdminError
    from gup.control.tokens import TokenError, local_path, read_token

    if where.token_file is not None:
        try:
            return read_token(where.token_file), ""
        except TokenError as error:
            raise AdminError(f"--token-file: {error}") from error
    if settings is None:
        return "", "gup's commands: --token-file"
    lack = ""
    for file in (settings.listen.admin_token_file, local_path(settings.cache.directory / "run")):
        if file is None:
            continue
        try:
            return read_token(file), ""
        except TokenError as error:
            lack = str(error)
    return "", lack
