"""The standing federation of the soak: `ChaosFederation` as it is installed, with nothing preloaded into its programs."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fedctl.demo_processes import free_ports
from tests.faults.chaos_federation import SITES, ChaosFederation, set_up
from tests.federation_fixture import (
    Federation,
    digits_plan,
    gone,
    noop_plan,
    wait_until,
)

# Its agent and its agent's compute process may die at any time; those of the other sites live from beginning to end.
MORTAL = SITES[2]
# Parameters of the largest updates: 8 MB.
_LARGEST = 2_000_000
_LIMITS = {"join_wait_s": 1, "stall_timeout_s": 15}


class SoakFederation(ChaosFederation):
    """Three agents, each behind a relay of its own."""

    def start(self, name: str, program: str, *arguments: str) -> None:
        Federation.start(self, name, program, *arguments)

    def environment(self) -> dict[str, str]:
        return Federation.environment(self)


def build(root: Path) -> SoakFederation:
    """Coordinator and agents, connected."""
    return set_up(SoakFederation(root, *free_ports(2)), heartbeat_s=1.0)


def first_plans(draw: Random) -> list[dict[str, Any]]:
    """One of each kind, of the largest size."""
    return [_transfers(draw, 6, _LARGEST), _digits(draw, 6, "fedimpres")]


def draw_plan(draw: Random) -> dict[str, Any]:
    """Transfers without training, or a small net over the digits, with or without impressions."""
    if draw.random() < 0.6:
        return _transfers(draw, draw.randint(10, 30), draw.choice((500_000, 1_000_000, _LARGEST)))
    return _digits(draw, draw.randint(6, 16), draw.choice(("fedimpres", "fedimpres", "fedavg")))


def _transfers(draw: Random, rounds: int, params: int) -> dict[str, Any]:
    return noop_plan(params, SITES, rounds=rounds, seed=draw.randrange(1 << 30), limits=_LIMITS)


def _digits(draw: Random, rounds: int, strategy: str) -> dict[str, Any]:
    return digits_plan(
        SITES,
        name=strategy,
        strategy=strategy,
        rounds=rounds,
        seed=draw.randrange(1 << 30),
        synthesis={"warmup_rounds": 1, "images": 20},
        limits=_LIMITS,
    )


Fault = Callable[[SoakFederation, Random], str]


def kill_agent(federation: SoakFederation, draw: Random) -> str:
    """`kill -9` of the mortal site's agent; its compute process has to find out by itself."""
    federation.kill(MORTAL)
    federation.start_agent(MORTAL)
    return f"kill {MORTAL}"


def kill_agent_compute(federation: SoakFederation, draw: Random) -> str:
    """`kill -9` of the mortal site's compute process."""
    return _kill_compute(federation, MORTAL)


def kill_coordinator_compute(federation: SoakFederation, draw: Random) -> str:
    """`kill -9` of the coordinator's compute process."""
    return _kill_compute(federation, "coordinator")


def kill_coordinator(federation: SoakFederation, draw: Random) -> str:
    """`kill -9` of the coordinator, sometimes with its compute process."""
    if draw.random() < 0.5:
        federation.kill("coordinator")
    else:
        federation.kill_with_compute("coordinator")
    federation.start_coordinator()
    return "kill coordinator"


def cut(federation: SoakFederation, draw: Random) -> str:
    """A site's connections are reset at both ends, or at its own alone."""
    site = draw.choice(SITES)
    if draw.random() < 0.3:
        federation.relays[site].half_open()
        return f"half open {site}"
    federation.relays[site].cut()
    return f"cut {site}"


def cut_amid_bytes(federation: SoakFederation, draw: Random) -> str:
    """A site's connections are reset once they have carried so much more, in the middle of whatever that is."""
    site, direction = draw.choice(SITES), draw.choice(("up", "down"))
    relay = federation.relays[site]
    relay.hold_after(direction, draw.randrange(1 << 20))
    time.sleep(draw.uniform(0.2, 1.0))
    relay.cut()
    relay.heal()
    return f"cut {site} amid bytes"


def partition(federation: SoakFederation, draw: Random) -> str:
    """Nothing passes between a site and the coordinator for a while."""
    site = draw.choice(SITES)
    federation.relays[site].silence()
    time.sleep(draw.uniform(0.2, 3.0))
    federation.relays[site].heal()
    return f"partition {site}"


def _kill_compute(federation: SoakFederation, name: str) -> str:
    pid = federation.compute_pid(name)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), f"{name}'s compute process is gone")
    return f"kill {name} compute"
