"""What the delivery rules say of one request: the values they compare and the decision. Decides nothing."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from gup.content.identity import NOBODY, Client
from gup.content.languages import Language
from gup.content.releases import Version


class Rule(StrEnum):
    """Why something is refused; the label of `gup_rule_refusals_total`."""

    UNLISTED = "unlisted"
    CONTENT_TYPE = "content_type"
    CLIENT_PATCHES_OFF = "client_patches_off"
    MANAGER_TOO_OLD = "manager_too_old"
    VERSION = "version"
    LANGUAGE = "language"
    UNDECLARED = "undeclared"


class Action(StrEnum):
    """What would help somebody who was refused, as a word for programs."""

    UPGRADE_CLIENT = "upgrade-client"
    UPGRADE_MANAGER = "upgrade-manager"
    MANAGER_OF_LANGUAGE = "manager-of-language"
    AUTOUPGRADE_TO_ENGLISH = "autoupgrade-to-english"
    DECLARE = "declare"
    CHANGE_SETTING = "change-setting"
    LIVEUPDATE = "liveupdate"


@dataclass(frozen=True, slots=True)
class Remedy:
    """One way out; `text` is a sentence for people."""

    action: Action
    text: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a stream would come from: an upstream as the rules see it. None is not stated in the settings."""

    name: str
    kind: Literal["manager", "liveupdate", "gup"] = "manager"
    version: Version | None = None
    language: Language | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """The client that a stream is for; None is any."""

    version: Version | None = None
    language: Language | None = None


ANYBODY = Fit()


@dataclass(frozen=True, slots=True)
class Decision:
    """May the client have it. `rule` is None exactly when it may; `because` is a sentence either way.

    `type` is the stream's type, "" for an unlisted one. `client` is nobody where the decision holds for
    every client. `notes` tell what was not as stated, or could not be compared.
    """

    because: str
    type: str
    rule: Rule | None = None
    client: Client = NOBODY
    fits: Fit = ANYBODY
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        return self.rule is None
