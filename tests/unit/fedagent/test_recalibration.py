"""What a site measures of a merged model: held against PyTorch's own statistics of real images."""

import pytest
import torch
from torch import Tensor

from fedagent import recalibration
from fedagent.recalibration import measure_statistics
from fedagent.resident import ResidentImages
from fedcore.compute_worker import Cancelled, Job
from fedcore.data import transforms
from fedcore.data.benchmark_sets import load_benchmark
from fedcore.device import open_device
from fedcore.errors import DataError, LearningError
from fedcore.models import build_model
from fedcore.models.base import FederatedModel, batch_norm_layers
from fedcore.plan import Plan

PLAN = Plan(
    name="p", rounds=3, seed=4, model={"name": "cnn", "classes": 10, "input": (1, 8, 8)}, training={"batch_size": 2}
)  # fmt: skip
DEVICE = open_device("cpu", 1)


@pytest.fixture(scope="module")
def images() -> ResidentImages:
    federation = load_benchmark("digits", sites=1, alpha=1.0, seed=0, max_train=42)
    (site,) = federation.sites.values()
    return ResidentImages.of(site.train, DEVICE)


@pytest.fixture
def model() -> FederatedModel:
    torch.manual_seed(0)
    return build_model(PLAN.model)


def measured(model: FederatedModel, images: ResidentImages, plan: Plan = PLAN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return measure_statistics(model, images, plan, Job(1, lambda message: None), "a round 1", generator)


def in_one_batch(model: FederatedModel, images: ResidentImages) -> dict[str, Tensor]:
    """PyTorch's own: the stored statistics of a training pass with momentum one, their variance a population's."""
    pixels_NCHW, _ = images.take(torch.arange(len(images)))
    sizes: dict[str, int] = {}
    for name, layer in batch_norm_layers(model).items():
        layer.train().momentum = 1.0
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: sizes.update({name: inputs[0].numel() // inputs[0].shape[1]})
        )
    with torch.no_grad():
        model.features(transforms.normalise(pixels_NCHW, PLAN))
    found = {}
    for name, layer in batch_norm_layers(model).items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        found[f"{name}.running_mean"] = layer.running_mean
        found[f"{name}.running_var"] = layer.running_var * (sizes[name] - 1) / sizes[name]
    return found


def test_in_one_batch_it_is_what_training_normalises_by(model, images):
    plan = PLAN.model_copy(update={"training": PLAN.training.model_copy(update={"batch_size": 64})})
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = measured(model, images, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    torch.manual_seed(0)
    expected = in_one_batch(build_model(PLAN.model), images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_batches_are_pooled_by_size_and_the_first_layer_is_exact(model, images, monkeypatch):
    """What the first layer sees does not depend on how images are batched, so its statistics don't either."""
    whole = measured(
        model,
        images,
        PLAN.model_copy(update={"training": PLAN.training.model_copy(update={"batch_size": 64})}),
    )
    monkeypatch.setattr(recalibration, "_BATCHES_AT_ONCE", 2)
    batched = measured(model, images)  # 4, 4, ..., 2: the last is smaller
    for name in ("norm1.running_mean", "norm1.running_var"):
        torch.testing.assert_close(batched[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(batched["norm3.running_var"], whole["norm3.running_var"])


def test_it_is_the_same_bits_whatever_was_stored_before(model, images):
    first = measured(model, images)
    for layer in batch_norm_layers(model).values():
        assert layer.running_var is not None
        layer.running_var.fill_(77.0)
    again = measured(model, images)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert all(value.dtype == torch.float32 for value in first.values())


def test_images_that_lie_class_by_class_are_measured_like_mixed_ones(model):
    """As folders give them: a batch of one class would be normalised as none is in training."""
    generator = torch.Generator().manual_seed(0)
    contrast_N111 = torch.linspace(0.1, 1, 4).repeat_interleave(64).view(-1, 1, 1, 1)
    noise = torch.randint(0, 255, (256, *PLAN.model.input), generator=generator)
    pixels = (noise * contrast_N111).to(torch.uint8)
    by_class = ResidentImages(pixels, torch.zeros(256, dtype=torch.int64), torch.device("cpu"))
    mixed = by_class.chosen(torch.randperm(256, generator=generator))
    found, expected = measured(model, by_class), measured(model, mixed)
    for name, value in expected.items():
        if name.endswith("running_var"):
            assert abs(float(found[name].sum() / value.sum()) - 1) < 0.02, name


def test_a_single_image_is_measured(model, images):
    found = measured(model, images.chosen(torch.tensor([3])))
    assert all(bool((value >= 0).all()) for name, value in found.items() if name.endswith("var"))


def test_without_images_or_with_weights_that_are_no_numbers_there_are_no_statistics(model, images):
    with pytest.raises(DataError, match="a round 1: there are no training images"):
        measured(model, images.chosen(torch.zeros(0, dtype=torch.int64)))
    next(iter(model.parameters())).data.fill_(float("nan"))
    with pytest.raises(LearningError, match=r"a round 1: statistic 'norm1.running_mean' holds NaN"):
        measured(model, images)


def test_it_ends_within_a_batch_when_withdrawn(model, images):
    job = Job(1, lambda message: None)
    job.cancel()
    with pytest.raises(Cancelled):
        measure_statistics(model, images, PLAN, job, "a", torch.Generator())


def test_a_model_that_normalises_by_groups_has_nothing_to_measure(images):
    section = PLAN.model.model_copy(update={"norm": "group"})
    plan = PLAN.model_copy(update={"model": section})
    assert measured(build_model(section), images, plan) == {}
