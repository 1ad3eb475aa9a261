"""Starts, the loop, whole banks, and when they are made."""

import math

import numpy as np
import pytest
import torch

from fedcore.compute_worker import Cancelled, Job
from fedcore.data import transforms
from fedcore.device import open_device
from fedcore.errors import LearningError, PlanError
from fedcore.models import build_model
from fedcore.models.state_file import save_state
from fedcore.plan import Plan
from fedserver.compute import ServerCompute
from fedserver.strategies import load_strategy, makes_impressions
from fedserver.synthesis import objective
from fedserver.synthesis.make import check_synthesis, make_bank
from fedserver.synthesis.optimise import ImageOptimiser, Part
from fedserver.synthesis.options import SynthesisOptions
from fedserver.synthesis.readiness import ready
from fedserver.synthesis.schedule import should_synthesise
from fedserver.synthesis.start import Style, public_images, starting_images


@pytest.fixture(scope="module")
def device():
    return open_device("cpu", 1)


def plan_for(strategy="fedimpres", *, images=10, warmup=2, every=1, norm="batch", seed=0, **options):
    return Plan(
        name="p",
        rounds=9,
        strategy=strategy,
        strategy_options=options,
        seed=seed,
        model={"name": "cnn", "classes": 4, "input": (3, 8, 8), "norm": norm},
        synthesis={"warmup_rounds": warmup, "every_rounds": every, "images": images},
    )


def model_for(plan, seed=0):
    torch.manual_seed(seed)
    model = build_model(plan.model)
    model(torch.randn(32, *plan.model.input))  # gives BatchNorm something to remember
    return model.eval().requires_grad_(False)


def silent():
    return Job(1, lambda m: None)


# starts


@pytest.mark.parametrize("kind", ["smooth", "white", "generator"])
@pytest.mark.parametrize("side", [1, 8, 28])
def test_starts_are_seeded_and_within_the_range_of_pixels(kind, side):
    bounds = transforms.pixel_bounds(plan_for())

    def draw(seed):
        style = Style(torch.arange(6) % 4, 4, torch.Generator().manual_seed(7))
        return starting_images(kind, (6, 3, side, side), bounds, torch.Generator().manual_seed(seed), style)

    images = draw(1)
    assert images.shape == (6, 3, side, side)
    assert (images >= bounds[0]).all()
    assert (images <= bounds[1]).all()
    assert torch.equal(images, draw(1))
    assert not torch.equal(images, draw(2)) or side == 1


def test_a_smooth_start_is_as_smooth_at_any_size():
    """`total_variation` measures slopes per 1/28 of the side."""
    bounds = torch.tensor(-1.0), torch.tensor(1.0)
    small, large = (
        objective.total_variation(
            starting_images("smooth", (8, 3, side, side), bounds, torch.Generator().manual_seed(1))
        )
        for side in (28, 256)
    )
    assert 0.7 * small < large < 1.4 * small


def test_a_smooth_start_is_smoother_than_a_white_one():
    bounds = transforms.pixel_bounds(plan_for())
    smooth, white = (
        objective.total_variation(
            starting_images(k, (20, 3, 28, 28), bounds, torch.Generator().manual_seed(0))
        )
        for k in ("smooth", "white")
    )
    assert smooth < 0.3 * white


# the loop


def ignore(done, total, loss):
    pass


# One thing at a time: no shifts, and no statistics unless a test asks for them.
PLAIN = {"space": "pixels", "jitter": 0, "batch_norm": 0.1}


def synthesise(model, plan, labels, watch=ignore, steps=100, **options):
    bounds = transforms.pixel_bounds(plan)
    start = starting_images(
        "smooth", (len(labels), *plan.model.input), bounds, torch.Generator().manual_seed(3)
    )
    optimiser = ImageOptimiser(
        model,
        SynthesisOptions(**{**PLAIN, **options}),
        bounds=bounds,
        generator=torch.Generator().manual_seed(5),
    )
    (images,) = optimiser.optimise([Part(start, labels, steps)], watch)
    return start, images


@pytest.mark.parametrize("space", ["pixels", "spectrum"])
def test_the_model_comes_to_see_the_labels(device, space):
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(12) % 4
    start, images = synthesise(
        model, plan, labels, steps=100, stationarity=0.0, total_variation=0.1, batch_norm=0.0, space=space
    )
    assert (model(start).argmax(1) == labels).float().mean() < 0.6
    assert (model(images).argmax(1) == labels).all()
    low, high = transforms.pixel_bounds(plan)
    assert (images >= low).all()
    assert (images <= high).all()


def test_the_model_itself_does_not_change(device):
    plan = plan_for()
    model = model_for(plan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    synthesise(model, plan, torch.arange(4), steps=3, batch_norm=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_step_does_not_depend_on_the_batch_size():
    """Each image moves as it would alone, where the images' losses do not meet in a shared term."""
    plan = plan_for(norm="group")
    model, labels = model_for(plan), torch.arange(8) % 4
    runs = [
        synthesise(model, plan, labels, steps=10, stationarity=0.0, batch_size=size)[1] for size in (1, 3, 8)
    ]
    assert torch.allclose(runs[0], runs[2], atol=1e-3)
    assert torch.allclose(runs[1], runs[2], atol=1e-3)


@pytest.mark.parametrize(
    ("option", "measure"),
    [
        ({"total_variation": 100.0}, objective.total_variation),
        ({"l2": 100.0}, objective.mean_square),
    ],
)
def test_priors_pull_where_they_should(option, measure):
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4
    off = {"total_variation": 0.0, "l2": 0.0, "steps": 30, "dual_passes": 1}
    _, free = synthesise(model, plan, labels, **off)
    _, held = synthesise(model, plan, labels, **{**off, **option})
    assert measure(held) < 0.5 * measure(free)


def test_batchnorm_statistics_are_matched():
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4

    def mismatch(images):
        rows = model.conv1(images).movedim(1, -1).flatten(0, -2)
        norm = model.norm1
        return ((rows.mean(0) - norm.running_mean).square() / norm.running_var).mean()

    _, free = synthesise(model, plan, labels, steps=40, dual_passes=1, total_variation=0.0)
    _, held = synthesise(model, plan, labels, steps=40, dual_passes=1, total_variation=0.0, batch_norm=10.0)
    assert mismatch(held) < 0.5 * mismatch(free)


def test_the_stationarity_term_brings_the_heads_gradient_towards_minus_gamma_w():
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4

    def residual(images):
        features = model.features(images)
        gradient = objective.head_gradient(model.head(features), features, labels)
        return objective.stationarity_residual(gradient, model.head.weight, 0.02).norm()

    options = {"steps": 30, "dual_passes": 3, "total_variation": 0.0, "gamma": 0.02}
    _, free = synthesise(model, plan, labels, stationarity=0.0, **options)
    published = {"stationarity_scale": "published", "rho": 50.0, "stationarity": 1.0}
    for held_by in (published, {"stationarity": 20.0}):
        _, held = synthesise(model, plan, labels, **held_by, **options)
        assert residual(held) < 0.3 * residual(free)


def test_a_spectrum_moves_smooth_patterns_first():
    """From the same start, on the same errand: what moves coefficients adds less grain, with no prior in the loss."""
    plan = plan_for(norm="group")
    model, labels = model_for(plan), torch.arange(8) % 4

    def moved(space):
        start, images = synthesise(
            model, plan, labels, steps=10, space=space, total_variation=0.0, image_lr=0.02
        )
        return objective.total_variation(images - start) / (images - start).square().mean()

    assert moved("spectrum") < 0.5 * moved("pixels")


def test_a_start_within_the_range_survives_the_way_to_coefficients_and_back():
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4
    start, images = synthesise(model, plan, labels, steps=1, space="spectrum", image_lr=1e-9)
    assert torch.allclose(images, start, atol=1e-4)


def test_automatic_jitter_follows_the_size():
    options = SynthesisOptions(jitter="auto")
    assert [options.shift_px(*size) for size in ((8, 8), (28, 28), (28, 64), (256, 256))] == [1, 2, 2, 18]
    assert SynthesisOptions(jitter=5).shift_px(8, 8) == 5
    for wrong in (-1, 65):
        with pytest.raises(ValueError, match=f"jitter is {wrong}, expected 'auto' or 0 to 64"):
            SynthesisOptions(jitter=wrong)


SHIFTED = {"jitter": 2, "flip": True}


def test_jitter_and_flips_follow_the_generator():
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4
    plain, shifted, again = (
        synthesise(model, plan, labels, steps=5, **options)[1] for options in ({}, SHIFTED, SHIFTED)
    )
    assert torch.equal(shifted, again)
    assert not torch.allclose(plain, shifted, atol=1e-3)


def test_a_warm_part_is_touched_up_beside_a_cold_one():
    plan = plan_for()
    model, labels = model_for(plan), torch.arange(8) % 4
    bounds = transforms.pixel_bounds(plan)
    start = starting_images("smooth", (8, 3, 8, 8), bounds, torch.Generator().manual_seed(3))
    told = []
    optimiser = ImageOptimiser(model, SynthesisOptions(), bounds=bounds, generator=torch.Generator())
    parts = [
        Part(start, labels, 7),
        Part(start, labels, 0),
        Part(start[:0], labels[:0], 9),
        Part(start, labels, 2),
    ]
    moved, kept, none, touched = optimiser.optimise(parts, lambda *step: told.append(step[:2]))
    assert told == [(n, 9) for n in range(1, 10)]
    assert torch.equal(kept, start)
    assert len(none) == 0
    assert (moved - start).abs().mean() > (touched - start).abs().mean() > 0


def test_disagreement_drives_two_models_apart():
    plan = plan_for()
    model, last = model_for(plan), model_for(plan, seed=1)
    labels, bounds = torch.arange(8) % 4, transforms.pixel_bounds(plan)
    start = starting_images("smooth", (8, 3, 8, 8), bounds, torch.Generator().manual_seed(3))

    for net in (model, last):
        net.head.weight *= 50  # untrained, they agree that they know nothing

    def agreement(weight):
        options = SynthesisOptions(disagreement=weight, stationarity=0.0, total_variation=0.0)
        optimiser = ImageOptimiser(
            model, options, bounds=bounds, generator=torch.Generator(), last_model=last
        )
        (images,) = optimiser.optimise([Part(start, labels, 30)], ignore)
        return objective.agreement(model(images), last(images)).item()

    assert agreement(50.0) < agreement(0.0) - 0.02


def test_a_time_budget_becomes_steps_before_the_work():
    plan = plan_for()
    bounds = transforms.pixel_bounds(plan)
    start = starting_images("smooth", (8, 3, 8, 8), bounds, torch.Generator().manual_seed(3))
    optimiser = ImageOptimiser(
        model_for(plan), SynthesisOptions(jitter=1), bounds=bounds, generator=torch.Generator().manual_seed(5)
    )
    parts = [Part(start, torch.arange(8) % 4, 50), Part(start[:0], torch.arange(0), 25)]
    assert optimiser.affordable(parts, 1e6)[0] == 50
    assert optimiser.affordable(parts, 1e-9)[0] == 1
    # Timing leaves images and the generator's draws as they were.
    (timed, _) = optimiser.optimise(parts, ignore)
    plain = ImageOptimiser(
        model_for(plan), SynthesisOptions(jitter=1), bounds=bounds, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(timed, plain.optimise(parts, ignore)[0])


def test_a_loss_that_is_not_finite_is_a_learning_error():
    plan = plan_for(norm="group")
    model = model_for(plan)
    model.head.weight[0, 0] = torch.nan
    with pytest.raises(LearningError, match="loss is nan in pass 1"):
        synthesise(model, plan, torch.arange(4), steps=2)


def test_every_step_is_watched():
    plan = plan_for()
    told = []
    synthesise(
        model_for(plan), plan, torch.arange(7) % 4, steps=3, dual_passes=2, batch_size=4,
        watch=lambda done, total, loss: told.append((done, total, float(loss))),
    )  # fmt: skip
    assert [t[:2] for t in told] == [(n, 12) for n in range(1, 13)]
    assert all(math.isfinite(t[2]) for t in told)


# making a bank


def make(plan, state, round_number=2, *, device, job=None, **given):
    options = SynthesisOptions(**{"gate": False, **plan.strategy_options})
    return make_bank(plan, round_number, state, options, device=device, job=job or silent(), **given)


def test_a_bank_is_made_again_the_same_and_differs_by_round(device, tmp_path):
    plan = plan_for(steps=3)
    state = model_for(plan).state_dict()
    banks = [make(plan, state, r, device=device).bank for r in (2, 2, 3)]
    digests = [bank.save(tmp_path / "bank") for bank in banks]
    assert digests[0] == digests[1] != digests[2]
    assert banks[0].images.dtype == torch.uint8
    assert banks[0].images.shape == (10, 3, 8, 8)
    assert banks[0].born.tolist() == [2] * 10


def test_soft_targets_and_features_are_the_models_answer_to_the_pixels_that_travel(device):
    plan = plan_for(steps=3)
    model = model_for(plan)
    bank = make(plan, model.state_dict(), device=device).bank
    features = model.features(transforms.normalise(bank.images, plan))
    assert torch.allclose(bank.features.float(), features, atol=1e-2)
    assert torch.allclose(bank.soft_targets.float(), model.head(features).log_softmax(1), atol=1e-2)


def test_a_warm_start_keeps_the_young_and_begins_the_rest(device):
    plan = plan_for(images=20, refresh=0.4, max_age_rounds=3, steps=2)
    state = model_for(plan).state_dict()
    bank, ages = None, []
    for number in range(2, 8):
        made = make(plan, state, number, device=device, previous=bank)
        bank = made.bank
        assert torch.bincount(bank.labels, minlength=4).tolist() == [5] * 4
        ages.append(max(number - bank.born).item())
        assert made.kept + made.fresh == 20
    assert ages == [0, 1, 2, 2, 2, 2]
    remade = make(plan_for(images=20, warm_start=False, steps=2), state, 8, device=device, previous=bank)
    assert (remade.kept, remade.fresh) == (0, 20)


def test_a_bank_of_other_images_is_not_warmed_up(device):
    plan = plan_for(steps=1)
    other = make(plan_for(steps=1, images=7), model_for(plan).state_dict(), device=device).bank
    narrow = Plan(**{**plan.model_dump(), "model": {"name": "cnn", "classes": 2, "input": (3, 8, 8)}})
    made = make(narrow, model_for(narrow).state_dict(), device=device, previous=other)
    assert made.kept == 0


def test_the_gate_holds_back_and_tells(device):
    plan = plan_for(images=24, gate=True, steps=2, stationarity=0.0, image_lr=1e-4)
    made = make(plan, model_for(plan).state_dict(), device=device)
    assert 0 < len(made.bank) < 24
    assert made.verdict.rejected == 24 - len(made.bank)
    assert made.note.startswith(f"rejected {24 - len(made.bank)} of 24 (")
    assert made.figures["rejected_share"] == pytest.approx(1 - len(made.bank) / 24)
    kept = made.bank
    assert (kept.soft_targets.argmax(1) == kept.labels).all()
    again = make(plan, model_for(plan).state_dict(), 3, device=device, previous=kept)
    assert again.kept + again.fresh == 24, "what was rejected is begun anew"


def test_a_model_that_recognises_nothing_gives_no_bank(device):
    plan = plan_for(images=6, gate=True, min_confidence=1.0, steps=1)
    with pytest.raises(LearningError, match=r"no impression passed the gate: rejected 6 of 6"):
        make(plan, model_for(plan).state_dict(), device=device)


def test_virtual_noise_images_are_the_start_as_it_is(device):
    plan = plan_for(start="generator", steps=0, refresh=0.0, images=8)
    first = make(plan, model_for(plan).state_dict(), device=device).bank
    later = make(plan, model_for(plan, seed=1).state_dict(), 9, device=device, previous=first).bank
    assert torch.equal(first.images, later.images)
    assert len(first.images.unique(dim=0)) == 8


def test_a_generators_images_are_more_alike_within_a_class():
    labels = torch.arange(40) % 4
    bounds = transforms.pixel_bounds(plan_for())
    style = Style(labels, 4, torch.Generator().manual_seed(1))
    images = starting_images("generator", (40, 3, 28, 28), bounds, torch.Generator().manual_seed(0), style)
    distances = torch.cdist(images.flatten(1), images.flatten(1))
    same = labels[:, None] == labels[None, :]
    within = distances[same & ~torch.eye(40, dtype=torch.bool)].mean()
    assert within < 0.8 * distances[~same].mean()


def test_a_time_budget_is_told_in_the_note(device):
    plan = plan_for(time_budget_s=1e-6)
    made = make(plan, model_for(plan).state_dict(), device=device)
    assert made.steps == (1, 0)
    assert made.note == "1 steps for new images, 0 for kept ones by the time budget"


def test_synthesis_reports_and_can_be_withdrawn(device):
    plan = plan_for()
    state = model_for(plan).state_dict()
    messages = []
    make_bank(plan, 2, state, SynthesisOptions(steps=5), device=device, job=Job(1, messages.append))
    last = messages[-1]["progress"]
    assert last["stage"] == "synthesising"
    assert last["done"] == last["total"] == 5
    job = silent()
    job.cancel()
    with pytest.raises(Cancelled):
        make_bank(plan, 2, state, SynthesisOptions(), device=device, job=job)


def test_what_torch_raises_becomes_a_learning_error(device, monkeypatch):
    plan = plan_for()
    state = model_for(plan).state_dict()

    def fail(self, images):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(type(model_for(plan)), "features", fail)
    with pytest.raises(LearningError, match="round 2: synthesis failed: no memory left"):
        make_bank(plan, 2, state, SynthesisOptions(), device=device, job=silent())


# schedule


@pytest.mark.parametrize(
    ("warmup", "every", "expected"),
    [
        ("auto", 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, 4, [2, 6]),
        (0, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (3, 3, [3, 6, 9]),
        (20, 1, []),
    ],
)
def test_schedule(warmup, every, expected):
    plan = plan_for(warmup=warmup, every=every)
    assert [r for r in range(1, 10) if should_synthesise(plan, r)] == expected


def test_only_fedimpres_makes_impressions():
    strategies = ("fedavg", "fedprox", "fedbn", "fedimpres", "fedimpres_paper")
    assert [s for s in strategies if makes_impressions(plan_for(s))] == ["fedimpres", "fedimpres_paper"]


@pytest.mark.parametrize(
    ("accuracy", "options", "has_bank", "expected", "reason"),
    [
        (0.30, {}, False, False, "validated accuracy 0.300, worth remembering from 0.344 (8 classes)"),
        (0.35, {}, False, True, "validated accuracy 0.350, worth remembering from 0.344"),
        (0.30, {"worth_remembering": 0.1}, False, True, "worth remembering from 0.213"),
        (0.30, {}, True, True, "there is a bank to keep up"),
        (None, {}, False, True, "no validated accuracy to wait for"),
        (0.0, {"worth_remembering": 0}, False, True, "nothing to wait for"),
    ],
)
def test_readiness_is_relative_to_chance_and_says_why(accuracy, options, has_bank, expected, reason):
    decision = ready(accuracy, 8, SynthesisOptions(**options), has_bank=has_bank)
    assert decision.ready is expected
    assert reason in decision.reason


def test_a_warm_up_that_the_plan_sets_in_rounds_is_the_operators_word():
    decision = ready(0.1, 8, SynthesisOptions(), warmup=2)
    assert (decision.ready, decision.reason) == (True, "the plan's warm-up of 2 rounds is over")
    assert not ready(0.1, 8, SynthesisOptions(worth_remembering=0.5), warmup=2).ready


def test_the_command_waits_and_says_why_until_there_is_a_bank(device, tmp_path):
    plan = plan_for(steps=2, gate=False, warmup="auto")
    save_state(tmp_path / "model", model_for(plan).state_dict())
    args = {
        "plan": plan.to_json(), "compute": {"device": "cpu", "threads": 1}, "round": 3,
        "model": str(tmp_path / "model"), "previous": None, "out": str(tmp_path / "bank"),
    }  # fmt: skip
    waiting = ServerCompute().synthesise({**args, "validation_accuracy": 0.3}, silent())
    assert (waiting["digest"], waiting["made"]) == (None, 0)
    assert waiting["note"].startswith("synthesis waits: validated accuracy 0.300")
    assert not (tmp_path / "bank").exists()
    made = ServerCompute().synthesise({**args, "validation_accuracy": 0.6}, silent())
    assert (made["made"], made["note"]) == (10, "")
    warmed = ServerCompute().synthesise(
        {**args, "round": 4, "previous": str(tmp_path / "bank"), "out": str(tmp_path / "next"),
         "last_model": str(tmp_path / "model"), "validation_accuracy": 0.3},
        silent(),
    )  # fmt: skip
    assert (warmed["figures"]["kept"], warmed["figures"]["fresh"]) == (8, 2)
    assert warmed["digest"] != made["digest"]


# bad input


def test_batchnorm_statistics_of_a_groupnorm_net_are_refused():
    plan = plan_for(norm="group", batch_norm=1.0)
    with pytest.raises(PlanError, match=r"batch_norm is 1.0, but 'cnn' with norm = 'group' has no BatchNorm"):
        check_synthesis(plan, build_model(plan.model), load_strategy(plan).synthesis)
    left_open = plan_for(norm="group")
    check_synthesis(left_open, build_model(left_open.model), load_strategy(left_open).synthesis)


def test_more_classes_than_the_head_are_refused():
    plan = plan_for()
    wider = plan.model_copy(update={"model": plan.model.model_copy(update={"classes": 9})})
    with pytest.raises(PlanError, match=r"model.classes is 9, the head of 'cnn' has 4 outputs"):
        check_synthesis(wider, build_model(plan.model), SynthesisOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"start": "images"}, "go together"),
        ({"start_images": "/tmp/x.npz"}, "go together"),
        ({"worth_remembering": 1.5}, "worth_remembering is 1.5"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(PlanError, match=message):
        load_strategy(plan_for(**options))


def write_images(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(arrays or {"images": np.arange(5 * 192, dtype=np.uint8).reshape(5, 8, 8, 3)}))
    return path


def test_public_images_are_a_start(device, tmp_path):
    path = write_images(tmp_path / "public.npz")
    plan = plan_for(start="images", start_images=str(path), steps=0, images=9)
    bank = make(plan, model_for(plan).state_dict(), device=device).bank
    public = torch.from_numpy(np.load(path)["images"]).permute(0, 3, 1, 2)
    assert all(any(torch.equal(image, other) for other in public) for image in bank.images)


def test_a_start_from_a_sites_home_is_refused(tmp_path):
    path = write_images(tmp_path / "site" / "data" / "train.npz")
    (tmp_path / "site" / "agent.toml").touch()
    link = tmp_path / "public.npz"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(PlanError, match="lies inside a site's home") as caught:
            public_images(name, (3, 8, 8))
        assert "never start from a site's images" in caught.value.hint
    (tmp_path / "site" / "agent.toml").unlink()
    assert public_images(link, (3, 8, 8)).shape == (5, 8, 8, 3)
    with pytest.raises(PlanError, match="lies inside a site's home"):
        public_images(link, (3, 8, 8), forbidden=[tmp_path / "site"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros(1)}, "expected 'images'"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "with N > 0"),
        ({"images": np.zeros((2, 9, 8, 3), np.uint8)}, r"images are uint8 \[2, 9, 8, 3\]"),
        ({"images": np.zeros((2, 8, 8, 3))}, "images are float64"),
    ],
)
def test_a_start_that_is_no_set_of_images_is_named(tmp_path, arrays, message):
    with pytest.raises(PlanError, match=message):
        public_images(write_images(tmp_path / "start.npz", **arrays), (3, 8, 8))


def test_a_start_that_is_no_file_is_named(tmp_path):
    (tmp_path / "start.npz").write_bytes(b"nothing")
    for name, message in ((tmp_path / "start.npz", "not an npz"), (tmp_path / "gone.npz", "not an npz")):
        with pytest.raises(PlanError, match=message):
            public_images(name, (3, 8, 8))
    plan = plan_for(start="images", start_images="relative.npz")
    with pytest.raises(PlanError, match="absolute path"):
        check_synthesis(plan, build_model(plan.model), load_strategy(plan).synthesis)
