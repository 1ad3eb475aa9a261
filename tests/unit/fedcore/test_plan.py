"""The plan's schema: what is refused, and that the message names the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import PlanError
from fedcore.plan import load_plan, parse_plan, plan_from_json, validate_plan
from fedcore.plan_robustness import MeanRule, TrimmedMeanRule

SMALLEST = """
name = "blood"
rounds = 6
[model]
name = "cnn"
classes = 8
input = [3, 28, 28]
"""


def document(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "blood", "rounds": 6, "model": {"name": "cnn", "classes": 2, "input": [3, 28, 28]},
    }  # fmt: skip
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return made


def test_the_smallest_plan_has_the_documented_defaults() -> None:
    plan = parse_plan(SMALLEST)
    assert (plan.strategy, plan.min_sites, plan.seed, plan.sites) == ("fedimpres", 1, 0, None)
    assert (plan.limits.round_deadline_s, plan.limits.stall_timeout_s, plan.limits.join_wait_s) == (
        3600,
        60,
        10,
    )
    assert plan.class_names == tuple("01234567")
    assert plan.mean == plan.std == (0.5, 0.5, 0.5)


def test_the_plan_of_operations_md_is_valid_and_survives_the_wire() -> None:
    plan = parse_plan(
        SMALLEST.replace(
            "rounds = 6", 'rounds = 6\nmin_sites = 2\nstrategy = "fedimpres"\nseed = 3\nsites = ["a", "b"]'
        )
        + """
[training]
epochs = 1
batch_size = 64
optimizer = "sgd"
learning_rate = 0.02
momentum = 0.9
[synthesis]
warmup_rounds = 2
every_rounds = 1
images = 64
[limits]
round_deadline_s = 300
stall_timeout_s = 60
[transform]
mean = [0.1, 0.2, 0.3]
"""
    )
    assert plan_from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["sites"] == ["a", "b"]
    assert plan.mean == (0.1, 0.2, 0.3)
    with pytest.raises(Exception, match="frozen"):
        plan.rounds = 7  # type: ignore[misc]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ronds": 3}, "unknown key 'ronds'"),
    ({"training__learning_rat": 0.1}, "unknown key 'training.learning_rat'"),
    ({"limits__stall": 1}, "unknown key 'limits.stall'"),
    ({"model__layers": 1}, "unknown key 'model.layers'"),
    ({"name": "Blood cells"}, "'name': "),
    ({"name": "../etc"}, "'name': "),
    ({"name": ""}, "'name': "),
    ({"rounds": 0}, "'rounds': .*greater than or equal to 1.*got 0"),
    ({"rounds": "many"}, "'rounds': .*got 'many'"),
    ({"min_sites": 0}, "'min_sites'"),
    ({"seed": -1}, "'seed'"),
    ({"seed": 2**31}, "'seed'"),
    ({"model__classes": 1}, "'model.classes'"),
    ({"model__input": [3, 28]}, "key 'model.input.2' is missing"),
    ({"model__input": [3, 28, 0]}, "'model.input.2'"),
    ({"model__input": [17, 28, 28]}, "'model.input.0'"),
    ({"model__norm": "layer"}, "'model.norm'"),
    ({"training__learning_rate": 0}, "'training.learning_rate'"),
    ({"training__learning_rate": float("nan")}, "'training.learning_rate'"),
    ({"training__learning_rate": float("inf")}, "'training.learning_rate'"),
    ({"training__momentum": 1}, "'training.momentum'"),
    ({"training__optimizer": "lion"}, "'training.optimizer'"),
    ({"training__batch_size": 0}, "'training.batch_size'"),
    ({"training__sites_per_round": 1, "min_sites": 2}, "training.sites_per_round is 1, below min_sites = 2"),
    ({"synthesis__images": 0}, "'synthesis.images'"),
    ({"limits__round_deadline_s": -5}, "'limits.round_deadline_s'"),
    ({"data__class_names": ["a", "a"]}, "class_names holds a name twice"),
    ({"data__class_names": ["a"]}, "data.class_names has 1 names, model.classes is 2"),
    ({"data__max_corrupt_fraction": 2}, "'data.max_corrupt_fraction'"),
    ({"evaluation__updates_images": 0}, "'evaluation.updates_images'"),
    ({"evaluation__update_data": "x"}, "unknown key 'evaluation.update_data'"),
    ({"transform__size": [32, 32]}, r"transform.size is \[32, 32\], model.input says \[28, 28\]"),
    ({"transform__channels": 1}, "transform.channels is 1, model.input says 3"),
    ({"transform__mean": [0.5]}, "transform.mean has 1 numbers, model.input has 3 channels"),
    ({"transform__std": [0.5, 0.5, 0]}, "'transform.std.2'"),
    ({"transform__augment": ["mixup"]}, "'transform.augment.0'"),
    ({"sites": ["a", "a"]}, "sites names a site twice"),
    ({"sites": ["a"], "min_sites": 2}, "min_sites is 2, but sites names only 1"),
    ({"sites": ["UPPER"]}, "'sites.0'"),
    ({"strategy_options": {"nested": {"a": 1}}}, "strategy_options.nested"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_is_wrong_is_refused_by_name_here_and_on_the_wire(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        validate_plan(document(**changes), "blood.toml")
    assert caught.value.message.startswith("blood.toml: ")
    with pytest.raises(PlanError):
        plan_from_json(json.dumps(document(**changes)))


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(PlanError, match=r"'rounds'.*; unknown key 'x'"):
        validate_plan(document(rounds=0, x=1))
    with pytest.raises(PlanError, match="key 'model' is missing"):
        validate_plan({"name": "a", "rounds": 1})


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(PlanError, match=r"broken.toml: not valid TOML"):
        load_plan(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe4"')
    with pytest.raises(PlanError, match="can't be read"):
        load_plan(tmp_path / "latin.toml")
    with pytest.raises(PlanError, match="can't be read"):
        load_plan(tmp_path / "missing.toml")
    with pytest.raises(PlanError):
        plan_from_json("not json")


def test_rules_against_bad_updates_have_options_of_their_own() -> None:
    plan = parse_plan(
        SMALLEST + '[aggregation]\nrule = "trimmed_mean"\ntolerate = 2\n[gate]\nnorm_factor = 4'
    )
    assert plan.aggregation == TrimmedMeanRule(rule="trimmed_mean", tolerate=2)
    assert plan_from_json(plan.to_json()) == plan
    assert parse_plan(SMALLEST).aggregation == MeanRule()
    with pytest.raises(PlanError, match=r"unknown key 'aggregation.median.tolerate'"):
        parse_plan(SMALLEST + '[aggregation]\nrule = "median"\ntolerate = 2')
    with pytest.raises(PlanError, match=r"'mean', 'median', 'trimmed_mean', 'multi_krum', 'norm_clip'"):
        parse_plan(SMALLEST + '[aggregation]\nrule = "average"')
    with pytest.raises(PlanError, match=r"multi_krum with tolerate = 1 needs 5 sites a round, there are 4"):
        parse_plan('sites = ["a", "b", "c", "d"]\n' + SMALLEST + '[aggregation]\nrule = "multi_krum"')


def test_sites_get_a_plan_that_agents_of_the_version_before_can_read() -> None:
    plan = parse_plan(SMALLEST + '[aggregation]\nrule = "median"\n[gate]\nnorm_factor = 4')
    document = json.loads(plan.to_site_json())
    assert not {"gate", "aggregation"} & document.keys()
    assert plan_from_json(plan.to_site_json()).training == plan.training
