"""How many files and connections this process may have open: enough for the agents that its configuration lets in."""

import resource

import structlog

# Databases, artifacts in transfer, operators, the compute process's pipes.
SPARE = 256
log = structlog.get_logger(__name__)


def allow_descriptors(max_agents: int) -> int:
    """Raise this process's limit to what `max_agents` connections need, as far as the system lets it. Gives the limit.

    One that is too low is told in the log: the agents beyond it could not connect, and nobody would know why.
    """
    needed = max_agents + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < needed:
        log.warning(
            "too few descriptors for max_agents",
            max_agents=max_agents,
            needed=needed,
            limit=soft,
            hint="raise LimitNOFILE of the service (ulimit -Hn in a shell), or lower max_agents of [admission] in "
            "fedserver.toml",
        )
    return soft
