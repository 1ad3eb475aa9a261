"""The bank and its gate: what stays, what is begun anew, what never leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import StorageError
from fedcore.models.state_file import save_state
from fedserver.synthesis.bank import LOWEST, Bank, class_sizes, compose
from fedserver.synthesis.gate import duplicates, inspect, recognised, within_statistics
from fedserver.synthesis.options import SynthesisOptions


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bank_of(labels, born, classes=4):
    count = len(labels)
    images = torch.randint(0, 255, (count, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    logits = torch.randn(count, classes, generator=seeded())
    features = torch.rand(count, 6, generator=seeded())
    return Bank.of(images, torch.tensor(labels), torch.tensor(born), logits, features)


def test_a_bank_survives_the_disk_and_refuses_something_else(tmp_path):
    bank = bank_of([0, 1, 2], [4, 5, 6])
    digest = bank.save(tmp_path / "bank")
    loaded = Bank.load(tmp_path / "bank")
    assert len(loaded) == 3
    assert loaded.born.tolist() == [4, 5, 6]
    assert loaded.soft_targets.dtype == loaded.features.dtype == torch.float16
    assert loaded.save(tmp_path / "again") == digest
    save_state(tmp_path / "other", {"images": bank.images})
    with pytest.raises(StorageError, match="not a bank"):
        Bank.load(tmp_path / "other")
    save_state(tmp_path / "uneven", {**{n: getattr(bank, n) for n in ("images", "labels", "born", "features")},
                                     "soft_targets": bank.soft_targets[:2]})  # fmt: skip
    with pytest.raises(StorageError, match="not a bank"):
        Bank.load(tmp_path / "uneven")


def test_soft_targets_are_log_probabilities_that_fit_half_precision():
    logits = torch.tensor([[0.0, 0.0], [1e6, 0.0]])
    bank = Bank.of(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]), torch.tensor([1, 1]),
                   logits, torch.full((2, 3), 1e9))  # fmt: skip
    assert bank.soft_targets[0].exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert bank.soft_targets[1].tolist() == [0.0, pytest.approx(LOWEST, rel=1e-3)]
    assert torch.isfinite(bank.features).all()


@given(count=st.integers(1, 60), classes=st.integers(1, 12), seed=st.integers(0, 5))
def test_sizes_are_balanced_and_add_up(count, classes, seed):
    sizes = class_sizes(count, classes, seeded(seed))
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sizes == class_sizes(count, classes, seeded(seed))


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    classes=st.integers(1, 6),
    refresh=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    max_age=st.integers(1, 6),
    lost=st.integers(0, 10),
    seed=st.integers(0, 3),
)
def test_over_many_rounds_a_bank_keeps_its_size_its_balance_and_its_age(
    count, classes, refresh, max_age, lost, seed
):
    sizes = class_sizes(count, classes, seeded(seed))
    generator, bank = seeded(seed), None
    for number in range(3, 12):
        chosen = compose(sizes, bank, number, refresh=refresh, max_age_rounds=max_age, generator=generator)
        again = compose(sizes, bank, number, refresh=refresh, max_age_rounds=max_age, generator=seeded(99))
        assert torch.equal(chosen.kept, again.kept)
        assert sorted(chosen.fresh.tolist()) == sorted(again.fresh.tolist())
        labels, born = chosen.fresh.tolist(), [number] * len(chosen.fresh)
        if bank is not None:
            labels += bank.labels[chosen.kept].tolist()
            born += bank.born[chosen.kept].tolist()
        assert [labels.count(k) for k in range(classes)] == sizes
        assert all(number - b < max_age for b in born)
        for label, size in enumerate(sizes):
            assert chosen.fresh.tolist().count(label) >= round(refresh * size)
        bank = bank_of(labels, born, classes)[torch.arange(len(labels)) >= min(lost, len(labels) - 1)]


def test_the_oldest_make_room():
    bank = bank_of([0, 0, 0, 0, 1, 1, 1, 1], [1, 4, 2, 3, 4, 4, 4, 4])
    chosen = compose([4, 4], bank, 5, refresh=0.5, max_age_rounds=10, generator=seeded())
    assert chosen.kept.tolist() == [1, 3, 4, 5]
    assert sorted(chosen.fresh.tolist()) == [0, 0, 1, 1]
    aged = compose([4, 4], bank, 5, refresh=0.0, max_age_rounds=2, generator=seeded())
    assert aged.kept.tolist() == [1, 4, 5, 6, 7]


# the gate


def sound(count=12, classes=4):
    """Impressions that pass: each of its own kind, recognised."""
    pixels = torch.randint(40, 200, (count, 3, 8, 8), dtype=torch.uint8, generator=seeded(1))
    labels = torch.arange(count) % classes
    logits = 5.0 * torch.nn.functional.one_hot(labels, classes)
    features = torch.randn(count, 16, generator=seeded(2))
    return pixels, labels, logits, features


def test_sound_impressions_pass_without_a_word():
    verdict = inspect(*sound(), SynthesisOptions())
    assert verdict.passed.all()
    assert verdict.rejected == 0
    assert verdict.describe() == ""


def test_what_the_model_does_not_recognise_is_rejected():
    pixels, labels, logits, features = sound()
    logits[3] = 0.0
    logits[3, 0] = 9.0
    verdict = inspect(pixels, labels, logits, features, SynthesisOptions())
    assert verdict.passed.tolist() == [i != 3 for i in range(12)]
    assert verdict.describe() == "rejected 1 of 12 (1 not recognised)"
    assert recognised(logits, labels, 0.999).sum() == 0
    assert recognised(logits, labels, 0.9).sum() == 11


def test_planted_duplicates_are_rejected_and_the_first_stays():
    pixels, labels, logits, features = sound()
    pixels[4] = pixels[0]  # in pixels, of the same class
    features[9] = features[5] * 1.0001  # in features, of the same class
    pixels[2] = pixels[1]  # of another class: no duplicate
    verdict = inspect(pixels, labels, logits, features, SynthesisOptions())
    assert (~verdict.passed).nonzero().flatten().tolist() == [4, 9]
    assert verdict.duplicates == 2
    nearly = pixels.clone()
    nearly[4] = (pixels[0].int() + 1).to(torch.uint8)
    found = duplicates(nearly, features, labels, torch.ones(12, dtype=torch.bool), 0.05)
    assert found.nonzero().flatten().tolist() == [4, 9]
    assert not duplicates(nearly, features, labels, torch.ones(12, dtype=torch.bool), 0.0).any()


def test_the_twin_of_a_rejected_image_may_stay():
    pixels, labels, logits, features = sound()
    pixels[4], logits[0] = pixels[0], torch.tensor([0.0, 5.0, 0.0, 0.0])
    verdict = inspect(pixels, labels, logits, features, SynthesisOptions())
    assert (~verdict.passed).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    "runaway",
    [
        torch.full((3, 8, 8), 120, dtype=torch.uint8),  # flat
        torch.randint(0, 2, (3, 8, 8), dtype=torch.uint8, generator=seeded()) * 255,  # black and white
        torch.randint(
            235, 255, (3, 8, 8), dtype=torch.uint8, generator=seeded()
        ),  # far lighter than the rest
    ],
)
def test_what_lies_outside_the_pixel_statistics_is_rejected(runaway):
    pixels, labels, logits, features = sound()
    pixels[7] = runaway
    assert within_statistics(pixels, 0.8).tolist() == [i != 7 for i in range(12)]
    verdict = inspect(pixels, labels, logits, features, SynthesisOptions())
    assert (verdict.unlikely, verdict.rejected) == (1, 1)
