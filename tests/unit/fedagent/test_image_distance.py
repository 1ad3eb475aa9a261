"""Distances between pictures: what leaves them alone, and that the search finds what a look at every pair finds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedagent.image_distance import (
    COARSE_PX,
    FINE_PX,
    FLAT,
    PictureIndex,
    averaged,
    orientations,
    slid_distance,
    standardised,
)
from fedagent.resident import ResidentImages
from fedcore.data import LabelledImages
from fedcore.device import open_device


def quiet(done, total):
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def device():
    return open_device("cpu", 1)


def pictures(count, side=28, channels=3, seed=0, width=None):
    """Smooth random images, as photographs are: uint8 [N, C, H, W]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 7, 7, generator=rng)
    images = torch.nn.functional.interpolate(coarse, (side, width or side), mode="bicubic").clamp(0, 1)
    return (images * 255).round().to(torch.uint8)


def index_of(images_NCHW, device):
    array = np.ascontiguousarray(images_NCHW.permute(0, 2, 3, 1).numpy())
    labels = np.zeros(len(array), dtype=np.int64)
    return PictureIndex(ResidentImages.of(LabelledImages(array, labels), device), quiet)


def test_a_hand_computed_distance():
    rows = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 1.0, 1.0]])
    assert standardised(rows).tolist() == [[-1, 1, -1, 1], [-1, -1, 1, 1]]
    one, other = rows.view(2, 1, 1, 2, 2)
    # Half of the four values differ by 2: sqrt((0 + 4 + 4 + 0) / 4).
    assert slid_distance(one, other).tolist() == pytest.approx([2**0.5])
    assert slid_distance(one, 1 - one).tolist() == pytest.approx([2.0])
    assert slid_distance(one, one * 0.3 + 0.4).tolist() == pytest.approx([0.0], abs=2e-3)


def test_what_is_flat_is_not_blown_up():
    flat = torch.full((1, 1, 4, 4), 0.5)
    dusty = flat.clone()
    dusty[0, 0, 0, 0] += FLAT / 4
    assert float(slid_distance(flat, dusty)) < 0.1
    assert float(slid_distance(flat, flat)) == 0


@given(
    st.integers(0, 10_000), st.sampled_from([8, 28, 40]), st.integers(0, 7), st.integers(-1, 1), st.integers(-1, 1),
    st.floats(0.3, 1.0), st.integers(-20, 20),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_turned_shifted_faded_copies_are_found_and_strangers_are_not(
    seed, side, way, down, right, contrast, bright
):
    device = open_device("cpu", 1)
    images = pictures(12, side, seed=seed)
    chosen = seed % 12
    copy = orientations(images[chosen : chosen + 1])[way]
    if side >= 28:
        copy = copy.roll((down, right), (2, 3))
    copy = ((copy.float() - 128) * contrast + 128 + bright).clamp(0, 255).round().to(torch.uint8)
    found = index_of(images, device).nearest(torch.cat([copy, pictures(1, side, seed=seed + 99_999)]), quiet)
    assert found.indices[0] == chosen
    assert float(found.distances[0]) < 0.35
    assert float(found.distances[1]) > float(found.distances[0])
    assert float(found.distances.max()) <= 2.001


@pytest.mark.parametrize(("side", "width"), [(28, 28), (28, 20), (96, 96), (5, 5)])
def test_the_search_agrees_with_a_look_at_every_pair(device, side, width):
    images, queries = pictures(30, side, 1, seed=1, width=width), pictures(9, side, 1, seed=2, width=width)
    found = index_of(images, device).nearest(queries, quiet)
    fine = averaged(images, FINE_PX)
    rows = []
    for query in averaged(queries, FINE_PX):
        ways = [slid_distance(way.expand_as(fine), fine) for way in orientations(query[None])]
        rows.append(torch.stack(ways).amin(0))
    pairs = torch.stack(rows)
    # The coarse pictures propose candidates, so of strangers the search may miss the nearest by a little, never undercut it.
    assert (found.distances >= pairs.gather(1, found.indices[:, None])[:, 0] - 1e-4).all()
    assert float((found.distances - pairs.amin(1)).mean()) < 0.03


def test_an_image_is_not_its_own_neighbour_and_one_alone_has_none(device):
    images = pictures(5)
    index = index_of(images, device)
    assert index.nearest(images, quiet).distances.tolist() == pytest.approx([0] * 5, abs=2e-3)
    others = index.nearest(images, quiet, itself=torch.arange(5))
    assert all(int(n) != i for i, n in enumerate(others.indices))
    assert others.distances.min() > 0.1
    lonely = index_of(images[:1], device).nearest(images[:1], quiet, itself=torch.zeros(1, dtype=torch.int64))
    assert lonely.distances.tolist() == [float("inf")]
    assert index.nearest(images[:0], quiet).distances.shape == (0,)


def test_chunks_change_nothing(device, monkeypatch):
    images, queries = pictures(50, seed=3), pictures(7, seed=4)
    whole = index_of(images, device).nearest(queries, quiet)
    monkeypatch.setattr("fedagent.image_distance._CHUNK_VALUES", 6000)
    monkeypatch.setattr("fedagent.image_distance._QUERIES", 3)
    parts = index_of(images, device).nearest(queries, quiet)
    assert parts.indices.tolist() == whole.indices.tolist()
    assert parts.distances.tolist() == pytest.approx(whole.distances.tolist(), abs=1e-5)


def test_large_images_are_kept_as_small_pictures(device):
    index = index_of(pictures(3, 224), device)
    assert index._coarse_NP.shape == (3, 3 * COARSE_PX * COARSE_PX)
    assert index._coarse_NP.dtype == torch.float16
    assert averaged(pictures(1, 224), FINE_PX).shape == (1, 3, 56, 56)
    assert averaged(pictures(1, 256, width=100), FINE_PX).shape == (1, 3, 51, 50)


def test_the_work_ends_when_it_is_withdrawn(device):
    class WithdrawnError(Exception):
        pass

    def withdraw(done, total):
        raise WithdrawnError

    index = index_of(pictures(3), device)
    with pytest.raises(WithdrawnError):
        index.nearest(pictures(2), withdraw)
