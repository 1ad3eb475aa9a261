"""From a bundle to services on three machines, each with a real systemd and a network of its own.

The order of the tests matters: each goes on where the one before it stopped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcore.data.benchmark_sets import load_benchmark, write_site
from fedcore.version import software_version
from fedctl.demo_plan import to_toml
from tests.federation_fixture import CLASSES, digits_plan, wait_until
from tests.foreign_certificate import write_foreign_certificate
from tests.machines import Machine, machines, why_not
from tests.stub_bundle import stub_bundle
from tests.systemd_analyze import MOST_EXPOSED, exposure_in

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
ROOT = Path(__file__).parents[2]
HOST = "fed.test"
HOMES = {"fedserver": "/var/lib/fedserver", "fedagent": "/var/lib/fedagent"}
# Longer than a beat of the compute process (5 s), far shorter than the unit's own.
WATCHDOG_S = 9


@dataclass
class Lab:
    """The machines, and the folder that all of them see as /mnt."""

    shared: Path
    machines: dict[str, Machine]
    bundle: str
    release: str = software_version()

    @property
    def coordinator(self) -> Machine:
        return self.machines["coordinator"]

    def install(self, machine: Machine, *words: str) -> str:
        return machine.do(f"{self.bundle}/install.sh", *words, timeout_s=1800).out

    def ctl(self, *words: str, timeout_s: float = 60) -> str:
        """`fedctl` on the coordinator's machine, as root."""
        return self.coordinator.do("fedctl", *words, timeout_s=timeout_s).out

    def enroll(self, machine: Machine, site: str, *words: str) -> None:
        """The operator's and the site's half of the README's journey, up to the started service."""
        token = json.loads(self.ctl("enroll", "token", "create", "--site", site, "-o", "json"))
        machine.do(
            "fedagent", "enroll", "--home", HOMES["fedagent"], "--coordinator", token["coordinator"],
            "--token", token["token"], "--ca-fingerprint", token["ca_fingerprint"], *words,
            user="fedagent",
        )  # fmt: skip
        machine.do("install", "-D", "-m", "644", f"/mnt/{site}.npz", f"/srv/images/{site}.npz")
        config = {
            "reconnect_max_s": 2.0,
            "data": {"kind": "npz", "path": f"/srv/images/{site}.npz", "class_names": list(CLASSES)},
            "compute": {"threads": 1},
        }
        path = f"{HOMES['fedagent']}/agent.toml"
        kept = [
            line for line in machine.do("cat", path).out.splitlines() if line.startswith("proxy")
        ]  # as `enroll` wrote it
        machine.write(path, "\n".join([*kept, to_toml(config)]), user="fedagent")
        machine.do("systemctl", "enable", "--now", "fedagent", timeout_s=120)

    def train(self, *sites: str) -> dict[str, object]:
        """A run of one round over these sites, to its end."""
        plan = digits_plan(sites, rounds=1, limits={"join_wait_s": 30, "round_deadline_s": 200})
        (self.shared / "plan.toml").write_text(to_toml(plan))
        run = json.loads(self.ctl("run", "submit", "/mnt/plan.toml", "-o", "json"))["run"]
        self.ctl("run", "wait", run, "-o", "json", timeout_s=300)
        (record,) = json.loads(self.ctl("run", "rounds", run, "-o", "json"))["rounds"]
        assert record["aggregated"] == len(sites), record
        return json.loads(self.ctl("run", "show", run, "-o", "json"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    python = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    usable = subprocess.run(
        ["sh", "-c", f"{python} -c 'import venv, ensurepip'"], capture_output=True, check=False
    )
    if usable.returncode:
        pytest.skip(f"the machines have no {python} with venv, for which the bundle would be made")
    folder = tmp_path_factory.mktemp("bundle")
    made = subprocess.run(
        [ROOT / "deploy" / "bundle.sh", "cpu", folder],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar.gz")
    with machines("coordinator", "direct", "proxied") as (shared, running):
        subprocess.run(["tar", "-xzf", archive, "-C", shared, "--no-same-owner"], check=True)
        archive.unlink()
        shutil.copy(ROOT / "tests" / "connect_proxy.py", shared)
        sites = ("here", "direct", "proxied")
        dealt = load_benchmark("digits", None, sites=len(sites), alpha=0.5, seed=1)
        for site, split in zip(sites, dealt.sites.values(), strict=True):
            write_site(split, shared / f"{site}.npz")
        write_foreign_certificate(shared / "inspecting", HOST, "Corp Inspection CA")
        for path in shared.rglob("*"):
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
        yield Lab(shared, running, f"/mnt/{archive.name.removesuffix('.tar.gz')}")


def test_a_bundle_installs_without_a_network_and_trains(lab: Lab) -> None:
    machine = lab.coordinator
    assert [line.split()[0] for line in machine.do("ip", "-brief", "link").out.splitlines()] == ["lo"]
    assert machine.do("ip", "route").out == ""
    said = lab.install(machine, "coordinator")
    assert "systemctl enable --now fedserver" in said
    assert f"release {lab.release} is there already" in lab.install(machine, "agent")
    machine.write("/etc/hosts", f"127.0.0.1 localhost {HOST}\n")
    machine.do(
        "fedserver", "init", "--home", HOMES["fedserver"], "--name", "lab", "--host", HOST, user="fedserver"
    )
    machine.do("systemctl", "enable", "--now", "fedserver", timeout_s=120)
    lab.ctl("context", "add", "lab", "--credential", f"{HOMES['fedserver']}/operator")
    lab.enroll(machine, "here")
    assert lab.train("here")["state"] == "DONE"
    logged = [json.loads(line) for line in machine.log("fedagent").splitlines() if line.startswith("{")]
    assert "connected" in {line["event"] for line in logged if line["at"] and line["level"]}


@pytest.mark.parametrize("unit", ["fedserver", "fedagent"])
def test_the_installed_units_are_valid_and_closed_and_what_computed_was_confined(lab: Lab, unit: str) -> None:
    machine = lab.coordinator
    verified = machine.run("systemd-analyze", "verify", "--man=no", f"/etc/systemd/system/{unit}.service")
    assert (verified.code, verified.out + verified.err) == (0, "")
    said = machine.run("systemd-analyze", "security", "--no-pager", f"{unit}.service").out
    assert exposure_in(said) <= MOST_EXPOSED[unit]
    offline = machine.run(
        "systemd-analyze", "security", "--no-pager", "--offline=true", f"{unit}.service"
    ).out
    assert exposure_in(offline) == exposure_in(said)

    # Aggregation and training were done by the compute processes, which are still there.
    pids = machine.do("cat", f"/sys/fs/cgroup/system.slice/{unit}.service/cgroup.procs").out.split()
    assert len(pids) >= 2
    for pid in pids:
        status = dict(
            line.split(":\t", 1)
            for line in machine.do("cat", f"/proc/{pid}/status").out.splitlines()
            if ":\t" in line
        )
        assert (status["Seccomp"], status["NoNewPrivs"], status["CapBnd"].strip("0")) == ("2", "1", ""), pid
        seen = machine.do("nsenter", "--target", pid, "--mount", "ls", "/home", "/root", "/dev").out.split()
        assert "null" in seen
        assert not {"kmsg", "sda", "vda"} & set(seen)
        mounts = machine.do("cat", f"/proc/{pid}/mounts").out
        assert re.search(r"^\S+ / \S+ ro[, ]", mounts, re.M), "ProtectSystem=strict"


def test_systemd_hears_of_life_and_starts_again_what_is_stuck(lab: Lab) -> None:
    machine = lab.coordinator
    for unit in HOMES:
        machine.do("mkdir", "-p", f"/run/systemd/system/{unit}.service.d")
        machine.write(
            f"/run/systemd/system/{unit}.service.d/test.conf", f"[Service]\nWatchdogSec={WATCHDOG_S}\n"
        )
    machine.do("systemctl", "daemon-reload")
    for unit, says in (("fedserver", "serves federation lab"), ("fedagent", "connected")):
        # `restart` ends when READY has come: the units are Type=notify.
        machine.do("systemctl", "restart", unit, timeout_s=120)
        assert machine.property(unit, "ActiveState") == "active"
        wait_until(lambda unit=unit, says=says: says in machine.property(unit, "StatusText"), says)
        first = machine.property(unit, "WatchdogTimestampMonotonic")
        wait_until(
            lambda unit=unit, first=first: machine.property(unit, "WatchdogTimestampMonotonic") != first,
            f"{unit}: WATCHDOG",
        )
        machine.do("systemctl", "kill", "--kill-whom=main", "--signal=STOP", unit)
        wait_until(lambda unit=unit: machine.property(unit, "NRestarts") == "1", f"{unit} started again", 60)
        wait_until(
            lambda unit=unit: machine.property(unit, "ActiveState") == "active", f"{unit} is up again", 60
        )
        assert "Watchdog timeout" in machine.log(unit)
        machine.do("systemctl", "stop", unit, timeout_s=60)
        # A program that ignored SIGTERM would have been killed: the result would be "timeout" or "signal".
        assert machine.property(unit, "Result") == "success"
        assert machine.property(unit, "ExecMainStatus") == "0"
        machine.do("systemctl", "start", unit, timeout_s=120)


def test_sites_that_may_only_dial_out_train_one_of_them_through_a_proxy(lab: Lab) -> None:
    coordinator, direct, proxied = (lab.machines[name] for name in ("coordinator", "direct", "proxied"))
    coordinator.do("systemctl", "stop", "fedagent")
    coordinator.join(direct, "10.77.1.1/24", "10.77.1.2/24", 1)
    coordinator.join(proxied, "10.77.2.1/24", "10.77.2.2/24", 2)
    fence(direct, "10.77.1.1", 8443, 8444)
    fence(proxied, "10.77.2.1", 3128, 3129)  # the coordinator's own ports are closed to it
    direct.write("/etc/hosts", f"127.0.0.1 localhost\n10.77.1.1 {HOST}\n")
    start_proxy(coordinator, "proxy", "3128")
    for machine in (direct, proxied):
        lab.install(machine, "agent")
        machine.do("systemd-run", "--unit=ear", "/usr/bin/python3", "-m", "http.server", "9999")
        wait_until(lambda machine=machine: dial(machine, "127.0.0.1", 9999), "something listens there")
    assert not dial(coordinator, "10.77.1.2", 9999)
    assert not dial(coordinator, "10.77.2.2", 9999)
    assert not dial(proxied, "10.77.2.1", 8443)
    assert HOST not in proxied.do("cat", "/etc/hosts").out  # the proxy looks the name up

    lab.enroll(direct, "direct")
    lab.enroll(proxied, "proxied", "--proxy", "http://10.77.2.1:3128")
    assert lab.train("direct", "proxied")["state"] == "DONE"
    assert coordinator.log("proxy").count(f"CONNECT {HOST}:8443") >= 1
    assert coordinator.log("proxy").count(f"CONNECT {HOST}:8444") == 1
    for machine in (direct, proxied):
        ears = machine.do("ss", "--no-header", "--listening", "--tcp", "--processes").out
        assert "fedagent" not in ears


def test_a_proxy_that_opens_tls_is_named(lab: Lab) -> None:
    coordinator, proxied = lab.coordinator, lab.machines["proxied"]
    start_proxy(coordinator, "inspector", "3129", "/mnt/inspecting/tls.crt", "/mnt/inspecting/tls.key")
    path = f"{HOMES['fedagent']}/agent.toml"
    proxied.do("sed", "-i", "s/:3128/:3129/", path)
    proxied.do("systemctl", "restart", "fedagent", timeout_s=120)  # up, though it can't connect
    for word in ("Corp Inspection CA", "opens TLS", "not the federation's"):
        wait_until(lambda word=word: word in proxied.log("fedagent"), word)
    assert "Corp Inspection CA" in proxied.property("fedagent", "StatusText")
    doctor = proxied.run("fedagent", "doctor", "--home", HOMES["fedagent"], user="fedagent")
    assert doctor.code == 1
    (line,) = [line for line in doctor.out.splitlines() if " inspection " in line]
    assert line.startswith("FAIL")
    assert "Corp Inspection CA" in line
    proxied.do("sed", "-i", "s/:3129/:3128/", path)
    proxied.do("systemctl", "restart", "fedagent", timeout_s=120)
    wait_until(lambda: proxied.property("fedagent", "StatusText").startswith("connected"), "connected again")


def test_upgrade_rollback_and_uninstall(lab: Lab) -> None:
    machine = lab.coordinator
    for unit in HOMES:
        machine.do("systemctl", "restart", unit, timeout_s=120)
    following = f"{lab.release}+next"
    lab.install(machine, "upgrade", "--release", following)
    running = machine.do("cat", f"/proc/{machine.property('fedserver', 'MainPID')}/cmdline").out
    assert f"/releases/{following}/bin/python" in running
    assert lab.train("here")["state"] == "DONE"
    said = machine.do("/opt/fedimpres/current/deploy/install.sh", "rollback", timeout_s=200).out
    assert f"current is release {lab.release} (before: {following})" in said
    assert lab.train("here")["state"] == "DONE"
    said = machine.do("/opt/fedimpres/current/deploy/install.sh", "uninstall", timeout_s=120).out
    assert "/var/lib/fedserver is kept" in said
    assert machine.run("systemctl", "cat", "fedserver").code != 0
    assert machine.do("ls", "/opt").out == ""
    assert machine.do("ls", f"{HOMES['fedserver']}/fedserver.toml").code == 0


def test_an_upgrade_leaves_what_was_stopped_and_tells_what_does_not_come_up() -> None:
    with machines("site") as (shared, running):
        machine = running["site"]
        for version in ("1.0", "1.1"):
            stub_bundle(shared / version, version)
        machine.do("/mnt/1.0/deploy/install.sh", "agent", timeout_s=600)
        machine.do("/mnt/1.1/deploy/install.sh", "upgrade", timeout_s=600)
        assert machine.run("systemctl", "is-active", "fedagent").out.strip() == "inactive"
        assert machine.run("systemctl", "start", "fedagent").code != 0  # the stub never says READY
        back = machine.run("/opt/fedimpres/current/deploy/install.sh", "rollback", timeout_s=600)
        assert back.code == 1
        assert "current is release 1.0 (before: 1.1)" in back.out
        assert "fedagent does not come up under release 1.0" in back.err


def fence(machine: Machine, peer: str, *ports: int) -> None:
    """Let nothing in but answers, and nothing out but to these ports of the peer."""
    rules = f"""
table inet fence {{
    chain input {{
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established,related accept
    }}
    chain output {{
        type filter hook output priority 0; policy drop;
        oif lo accept
        ct state established,related accept
        ip daddr {peer} tcp dport {{ {", ".join(map(str, ports))} }} accept
    }}
}}
"""
    machine.do("nft", "-f", "-", stdin=rules)


def start_proxy(machine: Machine, unit: str, port: str, *certificate: str) -> None:
    machine.do(
        "systemd-run",
        f"--unit={unit}",
        "/usr/bin/python3",
        "/mnt/connect_proxy.py",
        "0.0.0.0",
        port,
        *certificate,
    )
    wait_until(lambda: "listening" in machine.log(unit), f"{unit} listens")


def dial(machine: Machine, address: str, port: int) -> bool:
    """Whether a TCP connection succeeds within two seconds."""
    program = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
    return machine.run("/usr/bin/python3", "-c", program).code == 0
