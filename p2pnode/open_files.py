"""Whether this process may have as many files open as its connections need.

Owns the sum and the soft limit. Must never lower a limit, nor start a node that would refuse its peers for want of descriptors.
"""

from __future__ import annotations

from p2pnode.errors import ConfigError
from p2pnode.transport import TransportLimits

FILES_BESIDE = 64  # log, database, blobs, trainer, control socket: a daemon has about 30
SOFT_MAX = 65_536  # some programs make a table of this size


def files_needed(limits: TransportLimits) -> int:
    """File descriptors at the most: every connection, every dial under way, and what isn't the transport's."""
    return limits.connections_max + limits.dials_max + FILES_BESIDE


def provide_files(limits: TransportLimits) -> None:
    """Raise the soft limit on open files when it is below what is needed. Raises ConfigError when that isn't allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    need = files_needed(limits)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    if hard != resource.RLIM_INFINITY and hard < need:
        raise ConfigError(
            f"this process may open only {hard} files, and {limits.connections_max} connections need {need}: "
            f"raise the limit, for example with LimitNOFILE={4 * need} in its service or `ulimit -Hn {4 * need}` as root"
        )
    wanted = SOFT_MAX if hard == resource.RLIM_INFINITY else min(hard, SOFT_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, need), hard))
