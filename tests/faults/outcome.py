"""What a run must look like after a fault: ended as its policy says, counted once, bit for bit, and nothing left behind."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fedcore.artifact_store import artifact_path
from tests.faults.chaos_federation import SITES, ChaosFederation
from tests.faults.phases import FIRST
from tests.federation_fixture import wait_until

Participants = tuple[tuple[str, ...], ...]
# Descriptors and threads of a program come and go with connections and pools; a leak adds to them in each scenario.
_SLACK = {"descriptors": 12, "threads": 24}


@dataclass
class References:
    """Models of the rounds of runs that nobody disturbed, by plan and by who took part in each round."""

    federation: ChaosFederation
    known: dict[tuple[str, Participants], str] = field(default_factory=dict)

    def digest(self, document: dict[str, Any], participants: Participants) -> str:
        """Runs it the first time: sites that are to be missing from a round are not connected when it opens."""
        key = (document["name"], participants)
        if key not in self.known:
            self.known[key] = self._run(document, participants)
        return self.known[key]

    def _run(self, document: dict[str, Any], participants: Participants) -> str:
        federation = self.federation
        withheld: set[str] = set()

        def withhold(number: int) -> None:
            wanted = set(SITES) - set(participants[number - 1])
            for site in wanted - withheld:
                federation.relays[site].refuse()
                federation.wait_away(site)
            for site in withheld - wanted:
                federation.relays[site].heal()
                federation.wait_connected(site)
            withheld.clear()
            withheld.update(wanted)

        everybody = all(set(sites) == set(SITES) for sites in participants)
        document = {**document, "limits": {"join_wait_s": 60 if everybody else 1}}
        try:
            withhold(1)
            if everybody and len(set(participants)) == 1:
                # The first site's update comes last here, in scenarios often another's: order must not show in a bit.
                with federation.training(document, FIRST) as run:
                    wait_until(lambda: len(federation.stored(run, 1)) == len(SITES) - 1, "the other updates")
            elif len(set(participants)) == 1:
                run = federation.submit(document)
            else:
                run = self._in_steps(document, participants, withhold)
            federation.wait(run)
        finally:
            for site in withheld:
                federation.relays[site].heal()
                federation.wait_connected(site)
        assert accepted(federation, run) == participants, (accepted(federation, run), participants)
        return models(federation, run)

    def _in_steps(self, document: dict[str, Any], participants: Participants, withhold: Any) -> str:
        federation = self.federation
        assert len(participants) == 2, participants
        assert FIRST in participants[0], (
            "held, so that the first round can't end before the pause is asked for"
        )
        with federation.training(document, FIRST) as run:
            federation.control("PauseRun", run)
        federation.wait_phase(run, "PAUSED")
        withhold(2)
        federation.control("ResumeRun", run)
        return run


def accepted(federation: ChaosFederation, run: str) -> Participants:
    """Whose updates are in the model, round by round."""
    wait_until(lambda: "run_finished" in federation.journal(run), "the journal holds the end")
    return tuple(tuple(event["accepted"]) for event in federation.events(run, "aggregation_finished"))


def models(federation: ChaosFederation, run: str) -> str:
    """Digests of the rounds' models, in order; the last one's of the bytes that lie on the coordinator's disk."""
    records = [json.loads(e["record_json"]) for e in federation.events(run, "round_finished")]
    *earlier, digest = (str(record["model"]) for record in records)
    with artifact_path(federation.server_home / "artifacts", digest).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return " ".join([*earlier, found if found == digest else f"{digest} damaged: {found}"])


def counted_twice(federation: ChaosFederation, run: str) -> list[str]:
    """What the journal holds more than once, or merged without having it."""
    found = []
    stored = Counter((e["round"], e["site"]) for e in federation.events(run, "update_stored"))
    damaged = Counter(
        (e["round"], site) for e in federation.events(run, "aggregation_failed") for site in e["rejected"]
    )
    found += [f"{key} stored {n} times" for key, n in stored.items() if n > 1 + damaged[key]]
    measured = Counter((e["round"], e["site"]) for e in federation.events(run, "statistics_stored"))
    again = Counter(
        (e["round"], site) for e in federation.events(run, "statistics_lost") for site in e["lost"]
    )
    found += [f"statistics of {key} stored {n} times" for key, n in measured.items() if n > 1 + again[key]]
    for kind in ("aggregation_finished", "model_recalibrated", "round_finished"):
        rounds = Counter(e["round"] for e in federation.events(run, kind))
        found += [f"{kind} {number} {n} times" for number, n in rounds.items() if n > 1]
    for event in federation.events(run, "aggregation_finished"):
        found += [f"{site} merged {n} times" for site, n in Counter(event["accepted"]).items() if n > 1]
        found += [
            f"{site} merged, not stored" for site in event["accepted"] if not stored[event["round"], site]
        ]
        weights = event["merge"]["weights"]
        if sorted(weights) != sorted(event["accepted"]) or abs(sum(weights.values()) - 1) > 1e-9:
            found.append(f"round {event['round']}: weights {weights} of {event['accepted']}")
    return found


def lost(federation: ChaosFederation, run: str, since: dict[str, int]) -> list[str]:
    """Updates that sites were told are stored, and had to deliver again: by their logs from the bytes `since` on."""
    told: Counter[str] = Counter()
    for site in SITES:
        for line in federation.log(site, since[site]).splitlines():
            if "update delivered" in line and "OUTCOME_STORED" in line and run in line:
                told[f"{site} round {json.loads(line)['round']}"] += 1
    return [f"{which}: told {number} times that it is stored" for which, number in told.items() if number > 1]


def leaks(federation: ChaosFederation, run: str, usual: Counter[str], usual_files: set[str]) -> list[str]:
    """Files, processes, descriptors and threads that are left after a moment's patience.

    An update of this run that nobody waited for any more is none: it stays at its site until the next run begins, lest a
    coordinator that was restored have it trained again. The next scenario would find it.
    """
    unwanted = {
        f"{site}/tasks/{run}~{number}.json"
        for number, sites in enumerate(accepted(federation, run), start=1)
        for site in set(SITES) - set(sites)
    }

    def left() -> list[str]:
        held = federation.held_resources()
        grown = [
            f"{what}: {number}, usual {usual[what]}"
            for what, number in held.items()
            if number > usual[what] + _SLACK[what.split()[-1]]
        ]
        files = sorted(set(federation.left_files()) - usual_files - unwanted)
        return [*files, *federation.strays(), *grown]

    try:
        wait_until(lambda: not left(), "nothing left", timeout_s=10)
    except AssertionError:
        return left()
    return []
