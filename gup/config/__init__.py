"""Settings: one table of all, and how they are read."""

from gup.config.loading import load as load
from gup.config.loading import parse as parse
from gup.config.loading import read as read
from gup.config.settings import CONTENT_TYPES as CONTENT_TYPES
from gup.config.settings import KEY_IS as KEY_IS
from gup.config.settings import PRIVATE_NETWORKS as PRIVATE_NETWORKS
from gup.config.settings import Alarms as Alarms
from gup.config.settings import Cache as Cache
from gup.config.settings import CheapHours as CheapHours
from gup.config.settings import Clients as Clients
from gup.config.settings import Cluster as Cluster
from gup.config.settings import Listen as Listen
from gup.config.settings import Log as Log
from gup.config.settings import Rules as Rules
from gup.config.settings import Settings as Settings
from gup.config.settings import Upstream as Upstream
from gup.config.settings import Wan as Wan
from gup.config.settings import WanBudget as WanBudget
from gup.config.settings import WanHours as WanHours
from gup.config.settings import WanSchedule as WanSchedule
from gup.config.settings import signing_keys as signing_keys
