"""The site's own people against a real coordinator: policy, pause, status, doctor. The coordinator can't overrule them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation_fixture import SITES, Federation, digits_plan, wait_until

pytestmark = pytest.mark.slow
SITE = "clinic-b"


def restart(federation: Federation) -> None:
    program = federation.programs.pop(SITE)
    program.terminate()
    assert program.wait(60) == 0
    federation.start_agent(SITE)
    federation.wait_connected(SITE)


@pytest.fixture
def policy(federation: Federation) -> Iterator[Path]:
    """The place of a site's policy; afterwards the site is as before."""
    path = federation.site_home(SITE) / "policy.toml"
    yield path
    path.unlink(missing_ok=True)
    restart(federation)


def reason(federation: Federation) -> str:
    sites = federation.ctl("site", "list", "-o", "json").json["sites"]
    return str(next(site["unavailable_reason"] for site in sites if site["site"] == SITE))


def agent(federation: Federation, *words: str) -> tuple[int, str]:
    said = federation.command("fedagent", *words, "--home", str(federation.site_home(SITE)))
    return said.code, said.out


def test_what_the_policy_forbids_stays_undone_and_every_operator_sees_why(
    federation: Federation, policy: Path
) -> None:
    policy.write_text('models = ["resnet18"]\n')
    restart(federation)
    assert "models           resnet18" in agent(federation, "policy", "show")[1]
    assert reason(federation) == "", "the policy speaks of models, not of the site as a whole"
    refusal = "refuses: policy forbids model 'cnn' (allowed: resnet18)"
    with federation.training(digits_plan(rounds=1), SITES[-1]) as run:
        federation.start("watch", "fedctl", "run", "watch", run)
        watching = federation.programs.pop("watch")
        wait_until(lambda: f"{SITE} {refusal}" in federation.log("watch"), "an operator who watches sees why")
    assert watching.wait(60) == 0
    assert federation.wait(run).state == "DEGRADED"
    (record,) = federation.rounds(run)
    assert record["missing"] == {SITE: refusal}
    assert record["aggregated"] == len(SITES) - 1
    assert SITE not in record["sites"], "it does not evaluate what it does not train"


def test_pause_is_obeyed_at_once_and_outlasts_a_restart(federation: Federation) -> None:
    try:
        assert agent(federation, "pause", "--reason", "MRI upgrade")[0] == 0
        wait_until(lambda: reason(federation).endswith("MRI upgrade"), "the coordinator hears of the pause")
        code, said = agent(federation, "status")
        assert (code, "MRI upgrade" in said, "running (process" in said) == (8, True, True)
        restart(federation)
        assert reason(federation).endswith("MRI upgrade")
        run = federation.submit(digits_plan(rounds=1))
        assert federation.wait(run).state == "DEGRADED"
        assert federation.rounds(run)[0]["missing"][SITE].endswith("MRI upgrade")
    finally:
        assert agent(federation, "resume") == (0, "resumed\n")
    wait_until(lambda: not reason(federation), "the coordinator hears that work goes on")
    wait_until(lambda: agent(federation, "status")[0] == 0, "status says so too")
    assert agent(federation, "resume") == (0, "was not paused\n")


def test_doctor_looks_at_one_thing_a_line_and_disturbs_nothing(federation: Federation) -> None:
    before = federation.log_size(SITE)
    code, said = agent(federation, "doctor")
    lines = [line.split(maxsplit=2) for line in said.splitlines()]
    assert [name for _, name, _ in lines] == [
        "dns", "tcp", "tls", "inspection", "certificate", "coordinator", "clock", "protocol", "throughput",
        "device", "data", "shm", "disk",
    ]  # fmt: skip
    assert code == 0
    assert {verdict for verdict, _, _ in lines} <= {"ok", "warn"}, said
    found = {name: (verdict, text) for verdict, name, text in lines}
    assert found["tls"] == ("ok", "TLSv1.3, the chain leads to the federation's root")
    assert found["inspection"][0] == found["clock"][0] == found["protocol"][0] == "ok"
    code, said = agent(federation, "preflight")
    assert (code, [line.split()[1] for line in said.splitlines()]) == (
        0,
        ["disk", "device", "data", "certificate", "coordinator"],
    )
    assert federation.log_size(SITE) == before, "the running agent noticed nothing"


def test_a_policy_that_is_wrong_starts_nothing(federation: Federation, policy: Path) -> None:
    policy.write_text("max_epoch = 3\n")
    for command in ("check-config", "policy show", "doctor"):
        said = federation.command("fedagent", *command.split(), "--home", str(federation.site_home(SITE)))
        assert said.code == 78, command
        assert "unknown key 'max_epoch'" in said.err
    program = federation.programs.pop(SITE)
    program.terminate()
    program.wait(60)
    said = federation.command("fedagent", "serve", "--home", str(federation.site_home(SITE)))
    assert said.code == 78, "systemd does not start it again and again"
    policy.unlink()
    federation.start_agent(SITE)
    federation.wait_connected(SITE)
