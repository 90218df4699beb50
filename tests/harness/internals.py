"""What tests of behaviour have to know of gup's inside: imported here, so that a move there touches one file.

Tests beside their subject (tests/cache, tests/control, and so on) import it directly.
"""

from gup.cache.body import CUT, Body
from gup.cache.budget_gate import BudgetGate
from gup.cache.cache import Cache, Opened
from gup.cache.disk import ShortJobs, Space
from gup.cache.fair_shares import ClientCounts
from gup.cache.inflight import FillDependencies
from gup.cache.locks import Claims, Slots
from gup.cache.memory_files import ROW_WORDS, MemoryFiles
from gup.cache.negative_cache import FAILURE_WORDS, NegativeCache
from gup.cache.purges import Purge, Purges, Selection, add_purge
from gup.cache.records import CHUNK_BYTES, ChunkSums, FillState, Head, Record, chunk_sum
from gup.cache.recovery import Recovery
from gup.cache.scheduler import GROUPS, Backlog, FillQueue
from gup.cache.store import Store
from gup.cache.streams import Streams
from gup.client_names import ClientNames
from gup.config import Cache as CacheSettings
from gup.config import Settings
from gup.content.key import ContentKey, Variant
from gup.content.routes import Route, Routes
from gup.control.dependencies import change
from gup.control.eviction import Evictor
from gup.control.index import Index
from gup.control.reconcile import reconcile
from gup.errors import Problem
from gup.metrics import Counters, layout
from gup.server.access_log import AccessLog
from gup.server.admission import Admission
from gup.server.downloads import Downloads
from gup.server.handler import Handler
from gup.server.hot_cache import HotCache
from gup.server.listener import Listener
from gup.server.policy import Policy
from gup.upstream.bandwidth import CLOCK_WORDS, Turns, Wan
from gup.upstream.members import Members
from gup.upstream.pool import Pool
