"""The check of impressions by itself, and a planted image at a site through the trainer."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedagent.compute import AgentCompute
from fedagent.impression_check import (
    LIMIT_WITHOUT_REFERENCES,
    MIN_HELD_OUT,
    SitePictures,
    check_impressions,
    class_distances,
)
from fedagent.resident import ResidentImages
from fedagent.trainer import TrainRequest, train
from fedcore.compute_worker import Cancelled, Job
from fedcore.data import LabelledImages
from fedcore.device import open_device
from fedcore.impression_check import ImpressionCheck
from fedcore.models import build_model
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan

CLASSES, SIDE = 3, 16


@pytest.fixture(scope="module")
def device():
    return open_device("cpu", 1)


def quiet(done, total):
    pass


def silent():
    return Job(1, lambda m: None)


def site_images(count, seed):
    """Images with a class's bright corner and much that is an image's own: uint8 [N, H, W, 1]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[:, 0] * 150
    for image, label in zip(images, labels, strict=True):
        image[:6, int(label) * 5 : int(label) * 5 + 6] += 80
    return LabelledImages(images.clamp(0, 255).to(torch.uint8)[..., None].numpy(), labels.long().numpy())


NOTHING = LabelledImages(np.zeros((0, SIDE, SIDE, 1), np.uint8), np.zeros(0, np.int64))


def nchw(images):
    return torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()


def noise(count, seed=9):
    """What shows none of the site's images: smooth noise, uint8 [N, 1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1) * 255).byte()


def jpeg(pixels_1HW):
    file = io.BytesIO()
    Image.fromarray(pixels_1HW[0].numpy()).save(file, "JPEG", quality=75)
    return torch.from_numpy(np.array(Image.open(file)))[None]


PLANTED = {
    "itself": lambda image: image,
    "as JPEG": jpeg,
    "mirrored": lambda image: image.flip(2),
    "turned": lambda image: image.rot90(1, (1, 2)),
    "shifted": lambda image: torch.cat([image[:, :, 1:], image[:, :, -1:]], 2),
    "faded": lambda image: ((image.float() - 128) * 0.4 + 140).byte(),
}


def flat_features(pixels):
    return pixels.flatten(1).float().cpu()


def checked(train_images, held_out, impressions, labels=None, features_of=flat_features):
    resident = ResidentImages.of(train_images, open_device("cpu", 1))
    site = SitePictures.of(resident, held_out, quiet)
    labels = torch.zeros(len(impressions), dtype=torch.int64) if labels is None else labels
    return check_impressions(impressions, labels, resident, site, features_of, quiet)


def test_an_honest_bank_passes_and_every_kind_of_copy_does_not():
    held = site_images(60, 1)
    planted = torch.stack([change(nchw(site_images(40, 0))[7]) for change in PLANTED.values()])
    passed, found = checked(site_images(40, 0), (held, NOTHING), torch.cat([noise(30), planted]))
    assert passed.tolist() == [True] * 30 + [False] * len(PLANTED)
    assert (found.num_checked, found.num_refused, found.num_near_in_pixels) == (36, 6, 6)
    assert found.pixel_smallest < 1e-3 < found.pixel_limit < found.pixel_median
    assert found.feature_smallest == pytest.approx(0, abs=1e-3)
    assert found.reason.startswith(
        "6 of 36 impressions refused: 6 too near a training image (nearest 0.00, limit "
    )


def test_a_training_image_of_another_site_is_no_secret_here():
    passed, _ = checked(site_images(40, 0), (site_images(60, 1), NOTHING), nchw(site_images(5, 77)))
    assert passed.sum() >= 4


@pytest.mark.parametrize("held", [0, MIN_HELD_OUT - 1])
def test_without_enough_held_out_images_training_images_set_the_limit(held):
    images = site_images(40, 0)
    bank = torch.cat([noise(10), nchw(images)[3:4]])
    passed, found = checked(images, (NOTHING, site_images(held, 1)), bank)
    assert passed.tolist() == [True] * 10 + [False]
    _, usual = checked(images, (site_images(400, 1), NOTHING), bank)
    assert found.pixel_limit == pytest.approx(usual.pixel_limit, rel=0.5)
    assert found.feature_limit > 0


def test_copies_among_held_out_images_do_not_blind_the_check():
    images = site_images(40, 0)
    copies = images.take(np.arange(20))
    passed, found = checked(images, (site_images(40, 1), copies), nchw(images)[30:31])
    assert passed.tolist() == [False]
    assert found.pixel_limit > 0.1


def test_a_site_with_one_image_still_refuses_that_one():
    alone = site_images(1, 0)
    passed, found = checked(alone, (NOTHING, NOTHING), torch.cat([nchw(alone), noise(3)]))
    assert passed.tolist() == [False, True, True, True]
    assert found.pixel_limit == LIMIT_WITHOUT_REFERENCES
    assert found.feature_limit is None
    assert math.isfinite(found.feature_median)


def test_features_refuse_what_pixels_only_suspect_and_nothing_alone():
    images, held = site_images(40, 0), site_images(60, 1)
    target = nchw(images)[7]
    suspect = target.float() * 0.4 + nchw(site_images(1, 50))[0].float() * 0.6
    bank = torch.stack([suspect.byte(), noise(1)[0]])
    resident = ResidentImages.of(images, open_device("cpu", 1))
    site = SitePictures.of(resident, (held, NOTHING), quiet)
    away = site.index.nearest(bank, quiet).distances
    site = dataclasses.replace(site, limit=float(away[0]) - 0.01, middle=float(away[0]) + 0.01)
    assert away[1] > site.middle

    def features(pixels):
        """Both impressions have exactly the features of the target."""
        mine = torch.tensor([bool((bank == p.cpu()).flatten(1).all(1).any()) for p in pixels])
        return torch.where(mine[:, None], flat_features(target[None]), flat_features(pixels))

    passed, found = check_impressions(bank, torch.zeros(2).long(), resident, site, features, quiet)
    assert passed.tolist() == [False, True]
    assert (found.num_near_in_pixels, found.num_near_in_features) == (0, 1)
    assert "1 too near a training image in features" in found.reason


def test_features_that_are_not_finite_are_refused_and_leave_the_rest_alone():
    bank = noise(6)

    def features(pixels):
        found = flat_features(pixels)
        bad = torch.tensor([bool((bank[2] == p.cpu()).all()) for p in pixels])
        found[bad] = math.nan
        return found

    passed, found = checked(site_images(40, 0), (site_images(60, 1), NOTHING), bank, features_of=features)
    assert passed.tolist() == [True, True, False, True, True, True]
    assert (found.num_not_finite, found.num_refused) == (1, 1)
    assert math.isfinite(found.feature_median)
    assert math.isfinite(found.mean_distance)
    assert found.reason == "1 of 6 impressions refused: 1 with features that are not finite"


def test_a_model_that_has_diverged_leaves_pixels_to_decide_and_no_feature_figures():
    images = site_images(40, 0)

    def of_real_only(pixels):
        found = flat_features(pixels)
        return found if len(pixels) == 2 else torch.full_like(found, math.inf)

    bank = torch.cat([nchw(images)[:1], noise(1)])
    passed, found = checked(images, (site_images(60, 1), NOTHING), bank, features_of=of_real_only)
    assert passed.tolist() == [False, True]
    assert (found.feature_limit, found.feature_smallest, found.mean_distance, found.covariance_distance) == (
        None,
    ) * 4


def test_distances_of_means_and_covariances_by_hand():
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [0.0, 9.0]])
    made = torch.tensor([[1.0, 3.0], [1.0, 5.0], [7.0, 5.0]])
    labels, made_labels = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1])
    mean, covariance = class_distances(real, labels, made, made_labels, spread=2.0)
    # Class 0: (1, 0) against (1, 4): 16; class 1: (5, 5) against (7, 5): 4; both over 2 squared. Class 3 has no impression.
    assert mean == pytest.approx((16 + 4) / 2 / 4)
    # Of class 0 alone: diag(2, 0) against diag(0, 2).
    assert covariance == pytest.approx(math.sqrt(8) / 2)
    assert class_distances(real, labels, made, torch.tensor([2, 2, 2]), spread=2.0) == (None, None)
    assert class_distances(real, torch.arange(4), made, made_labels, spread=2.0)[1] is None


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(2, 12), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_covariance_distance_is_that_of_the_matrices(seed, num_real, num_made, size):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(num_real, size, generator=generator)
    made = torch.randn(num_made, size, generator=generator) * 2
    labels, made_labels = torch.zeros(num_real).long(), torch.zeros(num_made).long()
    _, distance = class_distances(real, labels, made, made_labels, spread=1.0)
    first, second = (torch.atleast_2d(torch.cov(x.double().T)) for x in (real, made))
    assert distance == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-6, abs=1e-6)
    assert class_distances(real, labels, real, labels, spread=1.0) == pytest.approx((0, 0), abs=1e-6)


def test_the_same_images_give_the_same_figures():
    bank = noise(8)
    again = [checked(site_images(700, 0), (site_images(1300, 1), NOTHING), bank)[1] for _ in range(2)]
    assert again[0] == again[1]


# -- through the trainer ------------------------------------------------------------------------


PLAN = Plan(
    name="p", rounds=4, seed=1,
    model={"name": "cnn", "classes": CLASSES, "input": (1, SIDE, SIDE), "options": {"width": 4}},
    training={"batch_size": 16, "learning_rate": 0.02},
)  # fmt: skip


def bank_file(folder, images, name="bank"):
    save_state(folder / name, {"images": images, "labels": torch.arange(len(images)) % CLASSES})
    return folder / name


def request_for(folder, bank, **changes):
    torch.manual_seed(0)
    save_state(folder / "model", build_model(PLAN.model).state_dict())
    fields = {
        "plan": PLAN, "site": "site-a", "run": "r1", "round": 1, "model": folder / "model", "impressions": bank,
        "objective": "impressions", "objective_options": {}, "local_tensors": (), "state": folder / "state",
        "out": folder / "update",
    }  # fmt: skip
    return TrainRequest(**{**fields, **changes})


def trained(folder, bank, device, *, check=True, **changes):
    images = ResidentImages.of(site_images(60, 0), device)

    def pictures(tick):
        return SitePictures.of(images, (site_images(60, 1), NOTHING), tick)

    request = request_for(folder, bank, **changes)
    return train(request, images, device, silent(), pictures_of=pictures if check else None)


def test_a_planted_image_is_not_trained_on(tmp_path, device):
    planted = torch.cat([noise(12), nchw(site_images(60, 0))[5:6]])
    result = trained(tmp_path, bank_file(tmp_path, planted), device)
    found = result.impression_check
    assert (found.num_checked, found.num_near_in_pixels, found.num_refused) == (13, 1, 1)
    assert result.num_impressions == 12
    # What is left is trained on as if the bank had never held more.
    clean = trained(tmp_path, bank_file(tmp_path, noise(12), "clean"), device, check=False)
    assert result.digest == clean.digest
    assert clean.impression_check is None


def test_a_check_that_refuses_nothing_changes_no_bit(tmp_path, device):
    bank = bank_file(tmp_path, noise(12))
    with_check, without = (trained(tmp_path, bank, device, check=check) for check in (True, False))
    assert with_check.impression_check.num_refused == 0
    assert with_check.digest == without.digest


def test_where_all_are_refused_the_round_is_one_without_impressions(tmp_path, device):
    stolen = bank_file(tmp_path, nchw(site_images(60, 0))[:9])
    result = trained(tmp_path, stolen, device)
    assert (result.impression_check.num_refused, result.num_impressions) == (9, 0)
    assert result.digest == trained(tmp_path, None, device).digest


def test_no_impressions_no_check(tmp_path, device):
    assert trained(tmp_path, None, device).impression_check is None
    unused = trained(tmp_path, bank_file(tmp_path, noise(4)), device, objective="cross_entropy")
    assert unused.impression_check is None


def test_a_withdrawn_job_ends_within_the_check(tmp_path, device):
    job = silent()
    images = ResidentImages.of(site_images(60, 0), device)

    def pictures(tick):
        job.cancel()
        return SitePictures.of(images, (NOTHING,), tick)

    request = request_for(tmp_path, bank_file(tmp_path, noise(4)))
    with pytest.raises(Cancelled):
        train(request, images, device, job, pictures_of=pictures)
    assert not request.out.exists()


def test_the_site_decides_and_its_report_says_what_was_found(tmp_path):
    arrays = {}
    for name, images in (
        ("train", site_images(60, 0)),
        ("val", site_images(30, 1)),
        ("test", site_images(30, 2)),
    ):
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images.images[..., 0], images.labels[:, None]
    np.savez(tmp_path / "data.npz", **arrays)
    bank = bank_file(tmp_path, torch.cat([noise(12), nchw(site_images(60, 0))[5:6]]))
    request = request_for(tmp_path, bank)
    args = {
        "data": {"kind": "npz", "path": str(tmp_path / "data.npz")}, "compute": {"device": "cpu", "threads": 1},
        "plan": PLAN.to_json(), "site": "site-a", "run": "r1", "round": 1, "model": str(request.model),
        "impressions": str(bank), "strategy_state": None, "objective": "impressions", "objective_options": {},
        "local_tensors": [], "personal_tensors": [],
        "check_impressions": True, "state": str(tmp_path / "state"), "out": str(request.out),
    }  # fmt: skip
    compute = AgentCompute()
    found = ImpressionCheck.model_validate(compute.train(args, silent())["report"]["impression_check"])
    assert (found.num_checked, found.num_refused) == (13, 1)
    # The data alone decides these, so they stay while the images are loaded.
    assert compute._images._loaded.pictures is not None
    pictures = compute._images._loaded.pictures
    compute.train({**args, "round": 2}, silent())
    assert compute._images._loaded.pictures is pictures
    report = compute.train({**args, "check_impressions": False}, silent())["report"]
    assert (report["impression_check"], report["num_impressions"]) == (None, 13)
    assert set(load_tensors(request.out)) == set(build_model(PLAN.model).state_dict())
