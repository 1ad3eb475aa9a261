"""A federation's long life in two minutes, told in steps: certificates that live for seconds, a stolen laptop, a new CA, a
coordinator that is lost with its disk. Every step says what it has proved.

By hand, from the repository's root: python -m tests.integration.journey_long
It needs nothing but this machine, and leaves nothing behind.

Nothing here is a matter of luck: a phase that something is to happen in is held still, and what must come is waited for.
"""

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcore.data.benchmark_sets import load_benchmark, write_site
from fedcore.errors import HeldError
from fedcore.v1 import admin_pb2, certificates_pb2
from fedctl.demo_processes import free_ports
from tests.federation_fixture import Federation, configure_agent, digits_plan, wait_until

A, STOLEN, C = "ward-a", "ward-b", "ward-c"
SITES = (A, STOLEN, C)
STAYING = (A, C)
# Renewed 25 to 30 seconds after they were issued: a machine that stalls for ten loses nobody.
LIFE_S = 45.0
REASON = "laptop stolen"
# The coordinator looks at every open stream twice a second.
STREAM_ENDS_WITHIN_S = 1.0


@dataclass
class Journey:
    """The federation, and who is told what was proved."""

    federation: Federation
    tell: Callable[[str], None] = print

    def travel(self) -> None:
        """All steps, in order. Raises AssertionError where one does not hold."""
        for step in (
            self.enrol_three_sites,
            self.renew_under_load,
            self.revoke_one_in_the_middle_of_a_round,
            self.rotate_the_ca_in_the_middle_of_a_round,
            self.lose_the_coordinator_and_restore_it,
        ):
            self.tell(f"== {step.__name__.replace('_', ' ')}")
            began = time.monotonic()
            step()
            self.tell(f"   ({time.monotonic() - began:.0f} s)")

    # -- the steps --------------------------------------------------------------------------------

    def enrol_three_sites(self) -> None:
        """`fedserver init`, a token for each site, `fedagent enroll`, `fedagent serve`."""
        made, home = self.federation, self.federation.server_home
        said = made.command(
            "fedserver", "init", "--home", str(home), "--name", "lab", "--host", "127.0.0.1",
            "--port", str(made.port), "--enroll-port", str(made.enroll_port),
        )  # fmt: skip
        assert said.code == 0, said
        config, days = home / "fedserver.toml", LIFE_S / 86400
        config.write_text(
            f"{config.read_text()}\nheartbeat_interval_s = 1.0\n[compute]\nthreads = 1\n"
            f"[certificates]\nsite_days = {days}\ncoordinator_days = {days}\n"
        )
        made.start_coordinator()
        made.ctl("context", "add", "lab", "--credential", str(home / "operator"))
        dealt = load_benchmark("digits", None, sites=len(SITES), alpha=1.0, seed=1)
        for site, split in zip(SITES, dealt.sites.values(), strict=True):
            write_site(split, made.data(site))
            made.enrol(site)
            configure_agent(made, site, made.data(site))
            made.start_agent(site)
        made.wait_connected(*SITES)
        self.proved(f"{', '.join(SITES)} are enrolled and connected; their certificates live {LIFE_S:g} s")

    def renew_under_load(self) -> None:
        """Runs follow each other without a gap until every site has renewed by itself."""
        made = self.federation
        pids = self._pids()
        runs = [made.submit(plan("renewing-1", SITES, rounds=8))]
        while not all(self._renewals(site) for site in SITES):
            runs.append(made.submit(plan(f"renewing-{len(runs) + 1}", SITES, rounds=8)))
            self._finished_whole(runs[-2])  # the next one waits already: there is no moment without work
        self._finished_whole(runs[-1])
        assert self._pids() == pids, "no program was restarted"
        spans = [(run.submitted_at, run.finished_at) for run in map(made.run, runs)]
        for site in SITES:
            at = self._renewals(site)[0].issued_at
            assert any(begin < at < end for begin, end in spans), f"{site} renewed at {at}, runs: {spans}"
        self.proved(
            f"every site renewed while {len(runs)} runs went on; all are DONE, no site missed a round"
        )

    def revoke_one_in_the_middle_of_a_round(self) -> None:
        """`fedctl cert revoke`, while the site trains and can't end."""
        made = self.federation
        # So long a site that is away may come back; the others are not tried by it, for they have nothing left to do.
        limits = {"round_deadline_s": 60, "stall_timeout_s": 12, "join_wait_s": 12}
        with made.training(plan("revoking", SITES, rounds=2, limits=limits), STOLEN) as run:
            wait_until(
                lambda: made.journal(run).count("update_stored") == len(STAYING), "the others' updates"
            )
            since = made.log_size("coordinator"), made.log_size(STOLEN)
            with stalls() as longest_stall_s:
                made.ctl("cert", "revoke", "--site", STOLEN, "--reason", REASON, "--yes")
                left = self._coordinator_says(since[0], "agent left", site=STOLEN)
            revoked = self._coordinator_says(since[0], "certificates revoked")
            took_s = (moment(left) - moment(revoked)).total_seconds()
            assert took_s < STREAM_ENDS_WITHIN_S + longest_stall_s(), f"{took_s:.2f} s"
            self.proved(
                f"its stream ended {took_s:.2f} s after the revocation, by the coordinator's own clock"
            )
            refused = self._coordinator_says(
                since[0], "rpc refused", caller=f"site/{STOLEN}", method="/fedcore.v1.Federation/Hello"
            )
            assert (refused["code"], REASON in refused["error"]) == ("UNAUTHENTICATED", True), refused
            wait_until(lambda: REASON in made.log(STOLEN, since[1]), "the site's own log says why")
            self.proved(f"its next call was refused: {refused['error']}")
            ended = made.wait(run)
        missed = {site for one in ended.missed for site in one.sites}
        assert (ended.state, missed) == ("DEGRADED", {STOLEN}), ended
        self.proved(f"the run went on without it and ended {ended.state}, which names {', '.join(missed)}")

    def rotate_the_ca_in_the_middle_of_a_round(self) -> None:
        """`fedctl cert ca rotate`, the operator's renewal, `--finish`: all of it within one round."""
        made, pids = self.federation, self._pids()
        with made.training(plan("rotating", STAYING), A) as run:
            moving = made.ctl("cert", "ca", "rotate", "--yes", "-o", "json").json
            made.ctl("cert", "renew")
            wait_until(lambda: not self._authority().waiting, "agents have renewed over their connections")
            finished = made.ctl("cert", "ca", "rotate", "--finish", "--yes", "-o", "json").json
            assert finished["root_fingerprint"] == moving["root_fingerprint"]
            assert (moving["previous_fingerprint"] is None, finished["previous_fingerprint"]) == (False, None)
            made.wait_connected(*STAYING)
            assert "round_finished" not in made.journal(run), "it was all within the first round"
        self._finished_whole(run)
        assert [record["attempts"] for record in made.rounds(run)] == [1, 1, 1]
        assert self._pids() == pids, "no program was restarted"
        self.proved("the old CA was replaced and dropped within one round; no round was lost or made twice")

    def lose_the_coordinator_and_restore_it(self) -> None:
        """A backup in the middle of a round; then machine and disk are gone; then an empty folder."""
        made, home = self.federation, self.federation.server_home
        key, backup, kept = made.root / "backup.key", made.root / "lab.fedbackup", made.root / "operator"
        recipient = made.ctl("backup", "key", "--out", str(key)).out.strip()
        with ExitStack() as still:
            run = still.enter_context(made.training(plan("surviving", STAYING), A))
            # No site gets a certificate, or does anything else, that the backup doesn't know.
            for site in SITES:
                still.enter_context(made.hold(site))
            made.ctl("backup", "create", "--recipient", recipient, "--out", str(backup))
            shutil.copytree(home / "operator", kept)  # it lies on the operator's machine
            made.kill_with_compute("coordinator")
            shutil.rmtree(home)
        self.proved("the coordinator is dead and its folder gone; what is left is a backup and its key")

        words = ("restore", "--home", str(home), "--from", str(backup), "--key", str(key))
        said = made.command("fedserver", *words)
        assert said.code == 0, said
        shutil.copytree(kept, home / "operator")
        since = {name: made.log_size(name) for name in ("coordinator", *SITES)}
        made.start_coordinator()
        assert "error[coordinator_held]" in made.ctl("status", expect=3).err
        self.proved(
            "restored onto an empty folder, it serves nobody before it is told what was revoked since"
        )
        said = made.command("fedserver", "release", "--home", str(home), "--no-revocations-since")
        assert said.code == 0, said
        wait_until(self._served, "it serves")
        made.wait_connected(*STAYING)
        for site in STAYING:
            said = made.command("fedagent", "audit", "verify", "--home", str(made.site_home(site)))
            assert (said.code, "restored from a backup, term 2" in said.out) == (0, True), said
        self.proved(f"released; {', '.join(STAYING)} follow its term 2, and say so in their audit logs")

        self._finished_whole(run)
        assert [record["round"] for record in made.rounds(run)] == [1, 2, 3]
        # It has neither a certificate that counts nor the new root: it tries, and is kept out by both.
        wait_until(lambda: '"not connected"' in made.log(STOLEN, since[STOLEN]), f"{STOLEN} has tried again")
        assert {one.revoked_by for one in self._certificates(STOLEN)} == {"admin"}, (
            "the revocation was restored"
        )
        made.wait_connected(*STAYING)
        assert STOLEN not in self._connected()
        assert made.ctl("audit", "verify", "-o", "json").json["ok"]
        self.proved(f"the run that was cut ended DONE with all its rounds; {STOLEN} is still kept out")

    # -- what the steps ask ------------------------------------------------------------------------

    def proved(self, text: str) -> None:
        """Tell one fact that was held."""
        self.tell(f"   {text}")

    def _finished_whole(self, run: str) -> None:
        ended = self.federation.wait(run)
        assert (ended.state, list(ended.missed)) == ("DONE", []), ended

    def _pids(self) -> dict[str, int]:
        return {
            name: program.pid for name, program in self.federation.programs.items() if program.poll() is None
        }

    def _renewals(self, site: str) -> list[Any]:
        """Certificates that the site got in exchange for another, the oldest first."""
        return sorted((one for one in self._certificates(site) if one.renews), key=lambda one: one.issued_at)

    def _certificates(self, site: str) -> list[Any]:
        request = certificates_pb2.ListCertificatesRequest(role="site", subject=site)
        with self.federation.admin() as admin:
            return list(admin.call(lambda _: admin.certificates.ListCertificates, request).certificates)

    def _connected(self) -> set[str]:
        with self.federation.admin() as admin:
            sites = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest()).sites
        return {site.id for site in sites if site.connected}

    def _authority(self) -> Any:
        with self.federation.admin() as admin:
            return admin.call(
                lambda _: admin.certificates.GetAuthority, certificates_pb2.GetAuthorityRequest()
            )

    def _served(self) -> bool:
        with contextlib.suppress(HeldError), self.federation.admin() as admin:
            return bool(admin.call(lambda stub: stub.WhoAmI, admin_pb2.WhoAmIRequest()).id)
        return False

    def _coordinator_says(self, since: int, event: str, **fields: str) -> dict[str, Any]:
        """The first such line of the coordinator's log after a byte; waited for."""
        wanted = {"event": event, **fields}

        def said() -> dict[str, Any] | None:
            for line in self.federation.log("coordinator", since).splitlines():
                with contextlib.suppress(ValueError):  # half a line
                    entry: dict[str, Any] = json.loads(line)
                    if wanted.items() <= entry.items():
                        return entry
            return None

        return wait_until(said, f"the coordinator says {wanted}")  # type: ignore[return-value]


def plan(name: str, sites: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """A run of small rounds, patient with a busy machine."""
    limits = {"round_deadline_s": 240, "stall_timeout_s": 120, "join_wait_s": 120}
    return digits_plan(sites, **{"name": name, "rounds": 3, "limits": limits, **changes})


def moment(entry: dict[str, Any]) -> datetime:
    """When a line was logged."""
    return datetime.fromisoformat(entry["at"])


@contextmanager
def stalls() -> Iterator[Callable[[], float]]:
    """Gives a function: by how many seconds a short sleep lasted too long, at most, since this was entered.

    Beside a measured time it tells a program that was slow from a machine that stood still.
    """
    over, longest_s = threading.Event(), 0.0

    def watch() -> None:
        nonlocal longest_s
        while not over.is_set():
            began = time.monotonic()
            time.sleep(0.05)
            longest_s = max(longest_s, time.monotonic() - began - 0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: longest_s
    finally:
        over.set()
        watcher.join()


def travel(root: Path, tell: Callable[[str], None] = print) -> None:
    """The journey in a new, empty folder. All that was started has ended when this returns or raises."""
    federation = Federation(root, *free_ports(2))
    try:
        Journey(federation, tell).travel()
    finally:
        federation.stop()
    federation.check_over()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="fedimpres-journey-") as folder:
        travel(Path(folder))
