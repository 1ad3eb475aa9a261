"""The gate: which updates are left out, with which numbers."""

import pytest
import torch

from fedcore.models.state_file import save_state
from fedcore.plan_robustness import GateSection
from fedcore.update_verdict import UpdateVerdict, gate_summary
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate
from fedserver.update_gate import examine

ZERO = {"w": torch.zeros(4), "bn.running_mean": torch.zeros(2), "n": torch.tensor(1)}


def moved(w, mean=0.1):
    return {
        "w": torch.full((4,), float(w)),
        "bn.running_mean": torch.full((2,), float(mean)),
        "n": torch.tensor(2),
    }


def verdicts(folder, updates, *, counts=None, registered=None, model=ZERO, **gate):
    save_state(folder / "global", model)
    listed = []
    for site, tensors in updates.items():
        save_state(folder / site, tensors)
        listed.append(SiteUpdate(folder / site, SiteReport(site, (counts or {}).get(site, 10))))
    request = MergeRequest(4, folder / "global", listed, (), folder / "out", parameters=frozenset({"w"}))
    return examine(request, GateSection(**gate), registered or {})


def test_an_update_far_longer_than_the_median_is_left_out_with_its_numbers(tmp_path):
    found = verdicts(
        tmp_path, {"a": moved(1), "b": moved(1.5), "c": moved(16)}, norm_factor=10, refuse_factor=5
    )
    assert [site for site, verdict in found.items() if verdict.passed] == ["a", "b"]
    assert found["c"] == UpdateVerdict(
        passed=False, tensors="parameters", norm=32.0, median=3.0, limit=30.0, num_examples=10,
        reason="c round 4: parameters moved by 32, 10.7 times the round's median 3, expected at most 10 times; "
        "update discarded",
    )  # fmt: skip
    assert found["a"].norm == 2.0
    assert (
        gate_summary({site: verdict.model_dump() for site, verdict in found.items()}) == "2 of 3, up to 1.0×"
    )


def test_an_update_somewhat_longer_than_the_median_is_shortened_to_the_longest_that_is_not(tmp_path):
    updates = {"a": moved(1), "b": moved(1), "c": moved(4), "d": moved(20), "e": moved(1)}
    found = verdicts(tmp_path, updates)
    assert all(verdict.passed for verdict in found.values())
    assert found["d"] == UpdateVerdict(
        passed=True, tensors="parameters", norm=40.0, median=2.0, limit=12.0, num_examples=10,
        kept={"parameters": 0.2},
        reason="d round 4: parameters moved by 40, 20.0 times the round's median 2, expected at most 6 times; "
        "shortened to 8",
    )  # fmt: skip
    assert not any(found[site].kept for site in "abce")
    assert (
        gate_summary({site: verdict.model_dump() for site, verdict in found.items()})
        == "5 of 5, up to 20.0×, 1 shortened"
    )
    far = verdicts(tmp_path, {**updates, "d": moved(31)})["d"]
    assert (far.passed, far.kept) == (False, {})
    assert "31.0 times the round's median 2, expected at most 30 times; update discarded" in far.reason


def test_too_long_in_one_kind_and_out_of_proportion_in_another_is_refused(tmp_path):
    updates = {"a": moved(1, 0.1), "b": moved(1, 0.1), "c": moved(7, 6)}
    found = verdicts(tmp_path, updates)["c"]
    assert (found.passed, found.tensors, found.kept) == (False, "statistics", {})


def test_statistics_are_held_against_their_own_median(tmp_path):
    updates = {"a": moved(100, 0.1), "b": moved(100, 0.1), "c": moved(100, 6)}
    found = verdicts(tmp_path, updates)
    assert (found["c"].passed, found["c"].tensors) == (False, "statistics")
    assert found["a"].passed
    assert all(v.passed for v in verdicts(tmp_path, {**updates, "c": moved(100, 4)}).values())


def test_what_is_no_number_or_no_shape_or_no_update_has_no_norm(tmp_path):
    updates = {
        "a": moved(1), "b": moved(1), "c": moved(1),
        "inf": moved(float("inf")), "nan": moved(1, float("nan")), "odd": {**moved(1), "w": torch.zeros(5)},
        "none": moved(1),
    }  # fmt: skip
    found = verdicts(tmp_path, updates, counts={"none": 0})
    assert [site for site, verdict in found.items() if verdict.passed] == ["a", "b", "c"]
    assert "inf round 4: tensor 'w' holds NaN or Inf" in found["inf"].reason
    assert "tensor 'bn.running_mean' holds NaN or Inf" in found["nan"].reason
    assert "has shape [5], expected [4]" in found["odd"].reason
    assert "trained on 0 images" in found["none"].reason
    assert {found[site].norm for site in ("inf", "nan", "odd", "none")} == {None}


def test_a_length_that_overflows_is_told(tmp_path):
    model = {**ZERO, "w": torch.full((4,), -3e38)}
    found = verdicts(tmp_path, {"a": moved(3e38), "b": moved(1)}, model=model)
    assert "distance from the model overflows" in found["a"].reason


@pytest.mark.parametrize(
    ("count", "passes"), [(66, False), (67, True), (100, True), (150, True), (151, False)]
)
def test_the_declared_number_of_images_must_be_near_the_registered_one(tmp_path, count, passes):
    updates = {site: moved(1) for site in "abc"}
    found = verdicts(tmp_path, updates, counts={"a": count}, registered={"a": 100, "b": 0})
    assert found["a"].passed is passes
    assert (found["a"].num_examples, found["a"].registered) == (count, 100)
    assert found["b"].registered is found["c"].registered is None
    if not passes:
        assert f"trained on {count} images, registered with 100, expected 67 to 150" in found["a"].reason
        assert found["a"].norm == 2.0
    again = verdicts(tmp_path, updates, counts={"a": count}, registered={"a": 100}, check_examples=False)
    assert again["a"].passed


def test_checks_that_are_off_or_have_no_scale_refuse_nothing(tmp_path):
    lonely = {"a": moved(1), "b": moved(1e6)}
    assert all(verdict.passed for verdict in verdicts(tmp_path, lonely).values())
    assert verdicts(tmp_path, lonely)["b"].reason == "norm not judged: fewer than 3 usable updates"
    still = {"a": moved(0, 0), "b": moved(0, 0), "c": moved(1, 0)}
    assert verdicts(tmp_path, still)["c"].reason == "norm not judged: most updates moved nothing"
    assert all(verdict.passed for verdict in verdicts(tmp_path, still).values())
    far = {"a": moved(1), "b": moved(1), "c": moved(1e6)}
    off = verdicts(tmp_path, far, check_norm=False)["c"]
    assert (off.passed, off.limit, off.median) == (True, None, 2.0)


def test_bad_updates_do_not_shift_the_median_that_others_are_held_against(tmp_path):
    updates = {
        "a": moved(1),
        "b": moved(1),
        "c": moved(1),
        "x": moved(float("nan")),
        "y": moved(500),
        "z": moved(500),
    }
    found = verdicts(tmp_path, updates, counts={"y": 999, "z": 999}, registered={"y": 10, "z": 10})
    assert found["a"].median == 2.0
    assert [site for site, verdict in found.items() if verdict.passed] == ["a", "b", "c"]
