"""A storage quota over real processes: old rounds go, a kill -9 right after changes nothing, and who asks is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import QuotaError
from fedctl.demo_processes import free_ports
from fedctl.model_commands import list_models
from tests.federation_fixture import Federation, noop_plan, wait_until, write_digits

SITE = "clinic-a"
PARAMS = 50_000


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Federation]:
    """A coordinator of its own, for it drops what other tests may want, and one site."""
    port, enroll_port = free_ports(2)
    made = Federation(tmp_path, port, enroll_port)
    ports = ("--port", str(port), "--enroll-port", str(enroll_port))
    home = ("--home", str(made.server_home))
    said = made.command("fedserver", "init", *home, "--name", "lab", "--host", "127.0.0.1", *ports)
    assert said.code == 0, said
    try:
        made.start_coordinator()
        made.enrol(SITE)
        write_digits(made, (SITE,))
        made.start_agent(SITE)
        made.wait_connected(SITE)
        assert made.ctl("context", "add", "lab", "--credential", str(made.server_home / "operator"))
        yield made
    finally:
        made.stop()
    made.check_over()


def stored(lab: Federation) -> set[str]:
    return {path.stem for path in (lab.server_home / "artifacts").glob("??/*.safetensors")}


def test_old_rounds_go_the_run_in_progress_survives_a_kill_and_who_asks_is_told(lab: Federation) -> None:
    old = lab.submit(noop_plan(PARAMS, (SITE,), name="old", rounds=5))
    assert lab.wait(old).state == "DONE"
    models = [record["model"] for record in lab.rounds(old)]
    size = (lab.server_home / "artifacts" / models[0][:2] / f"{models[0]}.safetensors").stat().st_size

    # Of another seed: the same would make the very same models again.
    with lab.training(noop_plan(PARAMS, (SITE,), name="new", rounds=3, seed=8), SITE) as new:
        lab.kill("coordinator")
        # There are seven, five and the first of each run: two are too many.
        config = lab.server_home / "fedserver.toml"
        config.write_text(f"{config.read_text()}\n[storage]\nquota_gib = {5.5 * size / (1 << 30)!r}\n")
        lab.start_coordinator()
        wait_until(lambda: "models_dropped" in lab.journal(old), "a drop")
        lab.kill_with_compute("coordinator")
    lab.start_coordinator()
    assert lab.wait(new).state == "DONE"
    assert lab.journal(new).count("round_finished") == 3

    with lab.admin() as admin:
        rounds = {model.round: model for model in list_models(admin, old)}
    assert rounds[1].dropped_at
    assert not rounds[5].dropped_at, "the last, and without validation the best"
    kept = stored(lab)
    assert models[0] not in kept
    assert models[4] in kept
    assert {record["model"] for record in lab.rounds(new)[-1:]} <= kept
    assert lab.run(old).models_dropped.startswith("1")

    refused = lab.ctl("model", "download", old, "--round", "1", "--out", str(lab.root / "m"), expect=6)
    assert refused.err.startswith(f"error[not_found]: run {old}: the model of round 1 was dropped at ")
    assert "storage quota" in refused.err
    assert "hint: rounds whose model is there: " in refused.err
    with pytest.raises(QuotaError, match="plan big: it needs .* expected at most") as too_big:
        lab.submit(noop_plan(PARAMS, (SITE,), name="big", rounds=50))
    assert "keep_models" in too_big.value.hint
