"""The limit of open files (RLIMIT_NOFILE) of this process and its children."""

import logging
import resource

_LOG = logging.getLogger(__name__)


def use_all_descriptors() -> int:
    """Raise the soft limit to the hard limit, for children too; the limit in force afterwards.

    A client is one descriptor, often two. Where the system refuses (the hard limit is above `fs.nr_open`,
    or a sandbox forbids the call) the process works with the limit it has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        _LOG.warning("no more than %d open files for this process: setrlimit: %s", soft, error)
        return soft
    return hard
