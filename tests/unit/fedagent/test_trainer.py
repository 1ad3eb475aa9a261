import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedagent.batches import EpochOrder, ImpressionSampler, batch_bounds
from fedagent.local_state import LocalState
from fedagent.noop import train_noop
from fedagent.resident import ResidentImages
from fedagent.trainer import TrainRequest, build_optimiser, learning_rate, train
from fedcore.compute_worker import Cancelled, Job
from fedcore.data import LabelledImages
from fedcore.device import open_device
from fedcore.errors import DataError, LearningError, TensorMismatchError
from fedcore.models import build_model
from fedcore.models.base import norm_tensor_names
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan
from fedserver.decoding import read_update

CLASSES = 3


@pytest.fixture(scope="module")
def device():
    return open_device("cpu", 1)


def plan_for(model="cnn", *, rounds=4, seed=1, norm="batch", augment=(), options=None, **training):
    return Plan(
        name="p",
        rounds=rounds,
        seed=seed,
        model={"name": model, "classes": CLASSES, "input": (1, 8, 8), "norm": norm, "options": options or {}},
        training={"batch_size": 8, "learning_rate": 0.05, **training},
        transform={"augment": augment},
    )


def labelled(count, seed=0):
    """Images whose class shows: one of three bands is bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label * 2 : label * 2 + 3] += 150
    return LabelledImages(images, labels.astype(np.int64))


def write_model(path, plan):
    torch.manual_seed(0)
    save_state(path, build_model(plan.model).state_dict())
    return path


def write_bank(path, count=10, label=0):
    images = torch.randint(
        0, 255, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    save_state(path, {"images": images, "labels": torch.full((count,), label)})
    return path


def ask(folder, plan, **changes):
    request = {
        "plan": plan, "site": "site-a", "run": "r1", "round": 1, "model": folder / "model",
        "impressions": None, "objective": "cross_entropy", "objective_options": {}, "local_tensors": (),
        "state": folder / "state", "out": folder / "update",
    }  # fmt: skip
    if not (folder / "model").exists():
        write_model(folder / "model", plan)
    return TrainRequest(**{**request, **changes})


def silent(messages=None):
    return Job(1, (lambda m: None) if messages is None else messages.append)


def test_training_learns_and_reports(tmp_path, device):
    messages = []
    request = ask(tmp_path, plan_for(epochs=6))
    images = ResidentImages.of(labelled(90), device)
    result = train(request, images, device, silent(messages))
    assert result.num_examples == 90
    assert result.num_steps == 6 * 12
    assert result.train_loss < 0.3
    assert result.num_impressions == 0
    assert result.digest == save_state(tmp_path / "copy", load_tensors(request.out))
    progress = [m["progress"] for m in messages]
    assert progress[0]["done"] == 0
    assert progress[-1]["done"] == progress[-1]["total"] == 72
    assert progress[-1]["stage"] == "training"
    assert progress[-1]["images_per_s"] > 0
    assert math.isfinite(progress[-1]["loss"])


def test_the_same_task_gives_the_same_bytes_and_another_round_or_site_others(tmp_path, device):
    images = ResidentImages.of(labelled(40), device)
    plan = plan_for(augment=("hflip", "rot90", "shift"))
    digest = train(ask(tmp_path, plan), images, device, silent()).digest
    torch.rand(7)  # the process's own random state must not matter
    assert train(ask(tmp_path, plan), images, device, silent()).digest == digest
    assert train(ask(tmp_path, plan, round=2), images, device, silent()).digest != digest
    assert train(ask(tmp_path, plan, site="site-b"), images, device, silent()).digest != digest


@pytest.mark.parametrize("count", [1, 2, 9, 17])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_odd_numbers_of_images_train_with_batchnorm(tmp_path, device, count, batch_size):
    plan = plan_for("resnet18", options={"width": 8}, batch_size=batch_size)
    result = train(ask(tmp_path, plan), ResidentImages.of(labelled(count), device), device, silent())
    assert result.num_examples == count
    assert all(torch.isfinite(t).all() for t in load_tensors(tmp_path / "update").values())


def test_no_images_is_a_data_error_that_names_the_site(tmp_path, device):
    with pytest.raises(DataError, match="site-a round 1: there are no training images"):
        train(ask(tmp_path, plan_for()), ResidentImages.of(labelled(0), device), device, silent())


def test_a_diverging_loss_names_site_round_and_batch(tmp_path, device):
    plan = plan_for(norm="group", learning_rate=1e30, epochs=3, momentum=0.0)
    with pytest.raises(LearningError, match=r"site-a round 1: .*(batch \d+ of \d+|NaN or Inf)"):
        train(ask(tmp_path, plan), ResidentImages.of(labelled(30), device), device, silent())
    assert not (tmp_path / "update").exists()


def test_a_poisoned_model_is_told_at_its_first_batch(tmp_path, device):
    plan = plan_for(norm="group")
    state = build_model(plan.model).state_dict()
    state["head.bias"][0] = torch.nan
    save_state(tmp_path / "model", state)
    with pytest.raises(LearningError, match="loss is nan in batch 1 of 4"):
        train(ask(tmp_path, plan), ResidentImages.of(labelled(30), device), device, silent())


def test_cancelling_ends_within_a_batch_and_keeps_nothing(tmp_path, device):
    class CancelledSoon(Job):
        checks = 0

        def check(self):
            self.checks += 1
            if self.checks == 5:
                self.cancel()
            super().check()

    job = CancelledSoon(1, lambda m: None)
    local = ("norm1.weight",)
    with pytest.raises(Cancelled):
        train(
            ask(tmp_path, plan_for(epochs=50), local_tensors=local),
            ResidentImages.of(labelled(60), device),
            device,
            job,
        )
    assert job.checks == 5
    assert not (tmp_path / "update").exists()
    assert LocalState(tmp_path / "state").newest() is None


def test_a_model_of_another_architecture_is_refused(tmp_path, device):
    write_model(tmp_path / "model", plan_for(options={"width": 16}))
    with pytest.raises(TensorMismatchError, match=r"site-a round 1: model 'cnn'.*shape"):
        train(ask(tmp_path, plan_for()), ResidentImages.of(labelled(9), device), device, silent())


def test_impressions_are_mixed_one_to_one(tmp_path, device, monkeypatch):
    bank = write_bank(tmp_path / "bank", count=10, label=2)
    seen = []
    original = nn.BatchNorm2d.forward

    def record(self, x):
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", record)
    request = ask(tmp_path, plan_for(), objective="impressions", impressions=bank)
    result = train(request, ResidentImages.of(labelled(12), device), device, silent())
    assert set(seen) == {16, 8}  # 8 real + 8, then 4 + 4, in one pass
    assert result.num_impressions == 10
    assert result.num_examples == 12


def test_impressions_change_the_update_and_their_absence_is_plain_cross_entropy(tmp_path, device):
    bank = write_bank(tmp_path / "bank")
    images = ResidentImages.of(labelled(20), device)
    plan = plan_for()
    plain = train(ask(tmp_path, plan), images, device, silent()).digest
    warm_up = train(ask(tmp_path, plan, objective="impressions"), images, device, silent())
    mixed = train(ask(tmp_path, plan, objective="impressions", impressions=bank), images, device, silent())
    ignored = train(ask(tmp_path, plan, impressions=bank), images, device, silent())
    assert warm_up.digest == plain
    assert warm_up.num_impressions == 0
    assert mixed.digest != plain
    assert ignored.digest == plain


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 9, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "images are"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), "images are torch.float32"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels are"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.full((4,), CLASSES), "3 classes"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "M > 0"),
    ],
)
def test_a_bank_that_does_not_suit_the_plan_is_refused(tmp_path, device, images, labels, message):
    save_state(tmp_path / "bank", {"images": images, "labels": labels})
    with pytest.raises(DataError, match=message):
        ResidentImages.of_bank(tmp_path / "bank", plan_for(), device)


def test_local_tensors_stay_and_a_repeated_round_repeats_itself(tmp_path, device):
    plan = plan_for(rounds=5)
    local = tuple(norm_tensor_names(build_model(plan.model)))
    images = ResidentImages.of(labelled(24), device)
    state = LocalState(tmp_path / "state")

    def play(round_number):
        request = ask(tmp_path, plan, local_tensors=local, round=round_number)
        return train(request, images, device, silent()).digest, state.newest()

    first, kept = play(1)
    assert set(kept) == set(local)
    assert not set(load_tensors(tmp_path / "update")) & set(local)
    second, kept_second = play(2)
    again, kept_again = play(2)
    assert again == second
    assert all(torch.equal(kept_second[name], kept_again[name]) for name in local)
    assert not torch.equal(kept["norm1.running_mean"], kept_second["norm1.running_mean"])
    assert play(1)[0] == first


def test_personal_tensors_are_sent_and_the_site_goes_on_with_its_own(tmp_path, device):
    plan = plan_for(rounds=5)
    personal = tuple(norm_tensor_names(build_model(plan.model)))
    images = ResidentImages.of(labelled(24), device)
    state = LocalState(tmp_path / "state")
    train(ask(tmp_path, plan, personal_tensors=personal), images, device, silent())
    own = state.newest()
    assert set(own) == set(personal)
    # The next global model's layers are far from the site's; what it trains starts from its own all the same.
    received = load_tensors(tmp_path / "model")
    moved = {name: tensor + 50 if name.startswith("norm") else tensor for name, tensor in received.items()}
    save_state(tmp_path / "moved", moved)
    request = ask(tmp_path, plan, personal_tensors=personal, round=2, model=tmp_path / "moved")
    train(request, images, device, silent())
    arrived = read_update(request.out, request.model, plan.transfer)
    kept = state.newest()
    assert set(arrived) == set(moved)
    for name in personal:
        if kept[name].is_floating_point():
            assert torch.allclose(arrived[name], kept[name], atol=0)
            assert (kept[name] - own[name]).abs().max() < 25


def test_proximal_stays_nearer_the_global_model(tmp_path, device):
    plan = plan_for(epochs=5)
    images = ResidentImages.of(labelled(40), device)

    def distance(mu):
        request = ask(tmp_path, plan, objective="proximal", objective_options={"mu": mu})
        train(request, images, device, silent())
        start, end = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "update")
        return sum(float((end[n] - start[n]).square().sum()) for n in start if "conv" in n or "head" in n)

    assert distance(5.0) < 0.5 * distance(0.0)


def test_noop_writes_another_update_for_each_site_and_round(tmp_path):
    plan = plan_for("noop", options={"params": 1000})
    digests = set()
    for site in ("a", "b"):
        for round_number in (1, 2):
            request = ask(tmp_path, plan, site=site, round=round_number)
            result = train_noop(request, silent())
            assert result.digest == save_state(tmp_path / "copy", load_tensors(request.out))
            digests.add(result.digest)
    assert len(digests) == 4
    assert train_noop(ask(tmp_path, plan, site="b", round=2), silent()).digest in digests
    start, end = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "update")
    assert sum(int((start[n] != end[n]).sum()) for n in start) == 1
    assert result.num_examples == 1


def test_noop_leaves_local_tensors_out(tmp_path):
    plan = plan_for("noop", options={"params": 1000})
    train_noop(ask(tmp_path, plan, local_tensors=("head.weight",)), silent())
    expected = set(load_tensors(tmp_path / "model")) - {"head.weight"}
    assert set(load_tensors(tmp_path / "update")) == expected


def test_cosine_falls_from_the_full_rate():
    training = plan_for(schedule="cosine", learning_rate=0.1).training
    rates = [learning_rate(training, r, 10) for r in range(1, 11)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.05)
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert learning_rate(plan_for().training, 9, 10) == 0.05


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimisers_take_the_plans_numbers(name, kind):
    training = plan_for(optimizer=name, weight_decay=0.25).training
    optimiser = build_optimiser(nn.Linear(2, 2), training, 0.125)
    assert type(optimiser) is kind
    assert optimiser.param_groups[0]["lr"] == 0.125
    assert optimiser.param_groups[0]["weight_decay"] == 0.25


def test_a_remainder_of_one_joins_the_batch_before():
    assert batch_bounds(9, 8) == [(0, 9)]
    assert batch_bounds(10, 8) == [(0, 8), (8, 10)]
    assert batch_bounds(3, 8) == [(0, 3)]
    assert batch_bounds(17, 8) == [(0, 8), (8, 17)]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17])
def test_an_epoch_has_every_image_once_and_no_batch_of_one(count):
    order = EpochOrder(count, 8, torch.Generator().manual_seed(0))
    batches = list(order.epoch())
    assert len(batches) == len(order)
    assert all(len(b) >= 2 for b in batches)
    drawn = torch.cat(batches).tolist()
    assert set(drawn) == set(range(count))
    assert len(drawn) == max(2, count)


def test_no_impression_comes_twice_before_all_have_come():
    sampler = ImpressionSampler(5, torch.Generator().manual_seed(0))
    first = sampler.draw(3)
    assert sampler.num_distinct == 3
    rest = sampler.draw(2)
    assert sorted(torch.cat([first, rest]).tolist()) == [0, 1, 2, 3, 4]
    assert len(sampler.draw(12)) == 12
    assert sampler.num_distinct == 5


def test_local_state_keeps_what_a_repetition_needs_and_forgets_the_rest(tmp_path):
    state = LocalState(tmp_path / "deep" / "state")
    assert state.newest() is None
    for round_number in (1, 2, 3, 5):
        state.save(round_number, {"x": torch.tensor(float(round_number))})
    assert state.newest()["x"].item() == 5
    assert state.before(5)["x"].item() == 3
    assert state.before(6)["x"].item() == 5
    assert state.before(3) is None
    assert len(list((tmp_path / "deep" / "state").iterdir())) == 2
