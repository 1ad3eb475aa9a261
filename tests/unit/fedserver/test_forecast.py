"""A dry run: sizes against real artifacts, traffic against a story of fetches, rates against records, and what is odd."""

from typing import Any

import pytest
import torch

from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, validate_plan
from fedcore.plan_forecast import PlanForecast, Sizes
from fedcore.round_record import ImpressionFigures, RoundRecord
from fedcore.tensor_file import TensorSpec, read_manifest
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.compute import ServerCompute
from fedserver.forecast import Enrolled, Measure, Surroundings, forecast, traffic
from fedserver.measured_rates import Past, Rates, measured
from fedserver.synthesis.bank import Bank, bank_bytes
from tests.unit.fedserver.test_server_compute import aggregation, command, initialise, plan_for, silent

SIZES = Sizes(model=1000, update=400, impressions=70, state=9)


def make_plan(**changes: Any) -> Plan:
    return validate_plan(
        {
            "name": "t", "rounds": 5, "min_sites": 2, "strategy": "fedavg", "sites": ["a", "b"],
            "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
            "data": {"class_names": ["x", "y", "z"]}, **changes,
        }
    )  # fmt: skip


def make_measure(**changes: Any) -> Measure:
    values: dict[str, Any] = {
        "sizes": SIZES, "objective": "cross_entropy", "shares_state": False, "synthesises": False,
        "synthesises_once": False, "overlaps": False, "averages": False,
        "recalibrates": False,
    }  # fmt: skip
    return Measure(**{**values, **changes})


def able(**changes: Any) -> federation_pb2.Capabilities:
    values: dict[str, Any] = {
        "models": ["cnn"], "objectives": ["cross_entropy"], "class_names": ["x", "y", "z"], "num_examples": 100,
        "software_version": "1",
    }  # fmt: skip
    return federation_pb2.Capabilities(**{**values, **changes})


def around(*sites: Enrolled, **changes: Any) -> Surroundings:
    present = sites or (Enrolled("a", "", able()), Enrolled("b", "", able()))
    return Surroundings(sites={site.id: site for site in present}, **{"free_bytes": 10**9, **changes})


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedavg", {}),
        ("fedbn", {}),
        ("scaffold", {}),
        ("fedopt", {"server_optimizer": "adam"}),
        ("fedimpres", {}),
    ],
)
def test_sizes_are_those_of_the_artifacts_themselves(tmp_path, strategy, options):
    plan = plan_for(strategy, **options)
    found = ServerCompute().measure(command(plan), silent())
    first = initialise(tmp_path, plan)
    model = load_tensors(tmp_path / "model")
    sizes = found["sizes"]
    assert sizes["model"] == read_manifest(tmp_path / "model")[0].payload_bytes
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in first["update_tensors"]]
    assert sizes["update"] == sum(spec.size_bytes for spec in specs)
    assert found["objective"] == first["objective"]
    updates = []
    for site in "ab":
        tensors = {spec.name: model.get(spec.name, torch.zeros(spec.shape)) for spec in specs}
        digest = save_state(tmp_path / site, tensors)
        path = str(tmp_path / site)
        updates.append({"site": site, "path": path, "digest": digest, "report": {"num_examples": 3}})
    merged = ServerCompute().aggregate(aggregation(plan, tmp_path, updates), silent())
    kept = 0 if merged["state_digest"] is None else read_manifest(tmp_path / "state")[0].payload_bytes
    assert sizes["state"] == kept
    assert (kept > 0) == (strategy in ("scaffold", "fedopt"))


def test_a_bank_is_as_large_as_it_is_said_to_be(tmp_path):
    plan = plan_for()
    count, features = plan.synthesis.images, 5
    bank = Bank.of(
        torch.zeros(count, 1, 8, 8, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64), torch.zeros(count, 3), torch.zeros(count, features),
    )  # fmt: skip
    bank.save(tmp_path / "bank")
    assert bank_bytes(plan, features) == read_manifest(tmp_path / "bank")[0].payload_bytes


@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("synthesis", [None, "beside", "after", "once"])
@pytest.mark.parametrize("shares_state", [False, True])
@pytest.mark.parametrize("recalibrates", [False, True])
def test_totals_are_what_a_site_that_forgets_nothing_fetches(
    rounds, averages, synthesis, shares_state, recalibrates
):
    plan = make_plan(rounds=rounds, synthesis={"warmup_rounds": 1, "every_rounds": 2})
    measure = make_measure(
        averages=averages, shares_state=shares_state, recalibrates=recalibrates, synthesises=synthesis is not None,
        synthesises_once=synthesis == "once", overlaps=synthesis == "beside",
    )  # fmt: skip
    fetched: dict[str, int] = {}
    bank = ""
    for number in range(1, rounds + 1):
        fetched[f"model {number - 1}"] = SIZES.model
        if bank:
            fetched[bank] = SIZES.impressions
        if shares_state and number > 1:
            fetched[f"state {number - 1}"] = SIZES.state
        released = f"average {number}" if averages and number > 1 else f"model {number}"
        fetched[released] = SIZES.model
        if recalibrates:
            fetched[f"merged {number}"] = SIZES.model
        if measure.makes_in(plan, number):
            bank = f"bank {number}"
    moved = traffic(plan, measure, 2)
    assert moved.total_down == sum(fetched.values())
    assert (moved.up, moved.total_up) == (400, 400 * rounds)


def test_sites_that_are_drawn_move_their_share():
    plan = make_plan(rounds=10, sites=["a", "b", "c", "d"], training={"sites_per_round": 2})
    moved = traffic(plan, make_measure(), 4)
    assert (moved.total_up, moved.total_down) == (5 * 400, 5 * 2 * 1000)


def test_each_site_says_whether_it_fits_and_why_not():
    plan = make_plan(sites=["a", "b", "c", "d", "e", "f"])
    sites = around(
        Enrolled("a", "", able()),
        Enrolled("b", "disabled by operator ann", None),
        Enrolled("c", "", None),
        Enrolled("d", "", able(models=["resnet18"])),
        Enrolled("e", "", able(class_names=["x", "odd"])),
        refused="site f is not enrolled",
    )
    found = forecast(plan, make_measure(), Rates(), sites)
    why = {site.site: site.why for site in found.sites}
    assert why["a"] == ""
    assert (why["b"], why["c"], why["f"]) == (
        "disabled by operator ann",
        "not connected",
        "not enrolled here",
    )
    assert "model 'cnn' is not installed there" in why["d"]
    assert "class 'odd'" in why["e"]
    assert found.blocked == "site f is not enrolled"
    assert forecast(plan, make_measure(), Rates(), around(Enrolled("a", "", able()))).blocked == (
        "1 of 6 sites fit, min_sites is 2"
    )


def test_disk_and_a_drain_block():
    full = forecast(make_plan(), make_measure(), Rates(), around(free_bytes=7000))
    # Six models are kept; two updates, a model and two states come and go.
    assert (full.disk_kept_bytes, full.disk_peak_bytes) == (6000, 6000 + 800 + 1000 + 18)
    assert "7000 are free" in full.blocked
    assert forecast(make_plan(), make_measure(), Rates(), around(held="draining")).blocked == "draining"
    assert forecast(make_plan(), make_measure(), Rates(), around()).blocked == ""


def past_run(plan: Plan, rounds: int = 2, train_s: float = 4.0, wait_s: float = 0.5) -> Past:
    records, events = [], []
    for number in range(1, rounds + 1):
        said = {"num_examples": 100, "seconds": train_s, "num_steps": 7}
        records.append(
            RoundRecord(
                round=number, expected=2, registered=2, started=2, reported=2, aggregated=2, accuracy=None,
                balanced_accuracy=None, training={"a": said, "b": said},
                impressions=ImpressionFigures(made=2),
                phases_s={"training": 9.0, "aggregating": 1.0, "evaluating": 2.0},
            )
        )  # fmt: skip
        opened = 100.0 * number
        events.append(
            ev.RoundOpened(at=opened, round=number, attempt=1, expected=("a",), registered=("a",), reason="")
        )
        report = ev.Report(num_examples=100, seconds=train_s)
        for site in "ab":
            events.append(
                ev.UpdateStored(
                    at=opened + train_s + wait_s,
                    round=number,
                    site=site,
                    digest="d",
                    payload_bytes=400,
                    report=report,
                )
            )
    return Past("t-1", plan, records, events)


def test_rates_come_from_what_earlier_runs_took():
    plan = make_plan(training={"epochs": 2})
    rates = measured(plan, [past_run(plan)], 400)
    assert rates.images_per_s["a"] == 100 * 2 / 4.0
    # 800 bytes in the first round (a model came too), 400 and two impressions of 64 pixels in the second.
    assert rates.bytes_per_s["a"] == pytest.approx((1600 + 1056) / 2)
    assert rates.phases_s == {"aggregating": 1.0, "evaluating": 2.0}
    found = forecast(plan, make_measure(), rates, around())
    site = found.sites[0]
    assert site.training_s == pytest.approx(4.0)
    assert site.transfer_s == pytest.approx(1400 / 1328)
    assert found.round_s == pytest.approx(4.0 + 1400 / 1328 + 1.0 + 2.0)
    assert found.run_s == pytest.approx(5 * found.round_s)
    assert found.not_measured == []


def test_what_was_not_measured_is_said_and_not_guessed():
    plan = make_plan()
    other_model = make_plan(model={"name": "cnn", "classes": 3, "input": [1, 16, 16]})
    rates = measured(plan, [past_run(other_model)], 400)
    assert rates.images_per_s == {}
    assert set(rates.bytes_per_s) == {"a", "b"}, "a network carries any model"
    found = forecast(plan, make_measure(), rates, around())
    assert (found.round_s, found.run_s, found.sites[0].training_s) == (None, None, None)
    assert "a: training of this model" in found.not_measured
    assert "coordinator: aggregating" in found.not_measured
    assert measured(plan, [past_run(plan)], 10**6).bytes_per_s == {}, (
        "small transfers say little of large ones"
    )


def test_a_policys_refusal_is_remembered_until_the_site_takes_part_again():
    plan = make_plan()
    refused = ev.SiteLetGo(
        at=1, round=1, site="b", reason="refuses: policy forbids model 'cnn' (allowed: none)"
    )
    gone = ev.SiteLetGo(at=1, round=1, site="a", reason="no connection for 60 s")
    past = Past("t-0", plan, (), (gone, refused))
    rates = measured(plan, [past], 400)
    assert set(rates.refusals) == {"b"}
    site = forecast(plan, make_measure(), rates, around()).sites[1]
    assert not site.fits
    assert "policy forbids model 'cnn'" in site.why
    assert measured(plan, [past, past_run(plan)], 400).refusals == {}
    assert measured(make_plan(training={"epochs": 3}), [past], 400).refusals == {}, (
        "another plan, another answer"
    )


def odd(measure: Measure | None = None, sites: Surroundings | None = None, **changes: Any) -> list[str]:
    found: PlanForecast = forecast(
        make_plan(**changes), measure or make_measure(), Rates(), sites or around()
    )
    return found.odd


def test_a_sensible_plan_is_not_odd():
    assert odd() == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"min_sites": 1}, "min_sites = 1"),
        ({"training": {"sites_per_round": 2}}, "sites_per_round = 2 has no effect"),
        ({"training": {"batch_size": 128}}, "more than all images of a, b"),
        ({"training": {"learning_rate": 3.0}}, "is high for sgd"),
        ({"training": {"optimizer": "adam", "learning_rate": 0.001, "momentum": 0.5}}, "momentum has no effect"),
        ({"training": {"early_stop": 5}}, "early_stop = 5 has no effect"),
        ({"synthesis": {"images": 8}}, "strategy 'fedavg' makes no impressions"),
        ({"limits": {"stall_timeout_s": 60, "round_deadline_s": 60}}, "costs the whole deadline"),
        ({"limits": {"stall_timeout_s": 6}}, "below two heartbeats"),
        ({"limits": {"join_wait_s": 60, "round_deadline_s": 60, "stall_timeout_s": 50}}, "join_wait_s = 60"),
        ({"data": {"class_names": ["x", "y", "z", "w"]}, "model": {"name": "cnn", "classes": 4, "input": [1, 8, 8]}},
         "no connected site has class w"),
    ],
)  # fmt: skip
def test_what_looks_unintended_is_told(changes, text):
    (found,) = odd(**changes)
    assert text in found


def test_impressions_that_nobody_sees_and_sites_that_differ_are_told():
    impressions = make_measure(synthesises=True)
    assert "no site will ever see" in odd(impressions, synthesis={"warmup_rounds": 5})[0]
    assert "fewer than one a class" in odd(impressions, synthesis={"images": 2})[0]
    mixed = around(Enrolled("a", "", able(software_version="2")), Enrolled("b", "", able(num_examples=0)))
    assert odd(sites=mixed) == [
        "sites run different versions: 1, 2",
        "a connected site has no training images",
    ]
