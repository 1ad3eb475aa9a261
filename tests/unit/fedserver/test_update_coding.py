"""Coded updates: what the site writes is what the coordinator reads, within what the coding says of its error."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedagent.encoding import encode_update, largest, rounded_to_int8
from fedcore.errors import LearningError, PlanError, TensorMismatchError
from fedcore.models.state_file import load_tensors, save_state, specs_of
from fedcore.plan import TransferSection, validate_plan
from fedcore.tensor_file import TensorManifest
from fedcore.update_coding import coded_specs
from fedserver.aggregation import merge_updates
from fedserver.decoding import open_update, read_update
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate
from fedserver.tensor_blocks import BLOCK
from fedserver.tensor_source import TensorFile

LOSSLESS, BF16, INT8 = (TransferSection(updates=name) for name in ("lossless", "bf16", "int8"))
TOP_K = TransferSection(updates="top_k", top_k_share=0.25)
CODINGS = pytest.mark.parametrize("transfer", [BF16, INT8, TOP_K], ids=lambda t: t.updates)


def state(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(6, 3, 3, 3, generator=generator) * scale,
        # More than a block, and a channel that no block's end falls together with.
        "fc.weight": torch.randn(7, BLOCK // 3 + 5, generator=generator) * scale,
        "fc.bias": torch.randn(7, generator=generator) * scale,
        "bn.num_batches_tracked": torch.tensor(seed),
    }


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    save_state(folder / name, tensors)
    return folder / name


def coded(
    folder: Path, start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], transfer: TransferSection
) -> Path:
    generator = torch.Generator().manual_seed(1)
    sent = encode_update(end, start, transfer, left_out={}, generator=generator).sent
    assert [*specs_of(sent)] == coded_specs(specs_of(end), transfer)
    return write(folder, transfer.updates, sent)


def trained(start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = state(9, 0.01)
    return {name: tensor + moved[name] for name, tensor in start.items()}


@CODINGS
def test_what_a_site_codes_the_coordinator_reads(tmp_path: Path, transfer: TransferSection) -> None:
    start, end = state(0), trained(state(0))
    got = read_update(coded(tmp_path, start, end, transfer), write(tmp_path, "start", start), transfer)
    assert got.keys() == end.keys()
    for name in ("fc.bias", "bn.num_batches_tracked"):
        assert torch.equal(got[name], end[name])
    for name in ("conv.weight", "fc.weight"):
        delta, error = end[name] - start[name], got[name] - end[name]
        if transfer is BF16:
            assert bool((error.abs() <= delta.abs() * 2**-8 + 1e-6).all())
        elif transfer is INT8:
            step = delta.flatten(1).abs().amax(1) / 127
            assert bool((error.flatten(1).abs() <= step[:, None] * 1.001 + 1e-6).all())
        else:
            kept = error.abs() < 1e-6
            assert int(kept.sum()) >= math.ceil(delta.numel() / 4)
            assert float(delta[~kept].abs().max()) <= float(delta[kept].abs().max())
            assert torch.equal(got[name][~kept], start[name][~kept])


def test_bytes_are_a_half_and_a_quarter(tmp_path: Path) -> None:
    start = state(0)
    whole = write(tmp_path, "whole", start).stat().st_size
    sizes = {
        t.updates: coded(tmp_path, start, trained(start), t).stat().st_size / whole
        for t in (BF16, INT8, TOP_K)
    }
    assert sizes["bf16"] == pytest.approx(0.5, abs=0.01)
    assert sizes["int8"] == pytest.approx(0.25, abs=0.01)
    assert sizes["top_k"] == pytest.approx(0.5, abs=0.01)  # a quarter of the numbers, each with its place


def test_rounding_is_right_on_average_and_the_same_for_the_same_seed() -> None:
    delta = torch.tensor([[0.3, -0.7, 127.0], [0.0, 0.0, 0.0]])
    draws = [rounded_to_int8(delta, torch.Generator().manual_seed(k)) for k in range(400)]
    mean = torch.stack([q.float() * step[:, None] for q, step in draws]).mean(0)
    assert torch.allclose(mean, delta, atol=0.1)
    again = rounded_to_int8(delta, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(again, draws[3], strict=True))


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.integers(1, 30))
def test_the_largest_are_the_largest_and_ascend(values: list[float], count: int) -> None:
    flat = torch.tensor(values)
    got, places = largest(flat, min(count, len(values)))
    assert places.tolist() == sorted(set(places.tolist()))
    assert torch.equal(flat[places], got)
    left = [abs(v) for k, v in enumerate(values) if k not in places.tolist()]
    assert not left or max(left) <= float(got.abs().min())


def test_what_top_k_leaves_out_comes_with_a_later_round() -> None:
    """Error feedback: over rounds without any training, all of the first difference arrives."""
    start = {"w": torch.zeros(4, 5)}
    end = {"w": torch.arange(20.0).reshape(4, 5) - 7}
    left: dict[str, torch.Tensor] = {}
    arrived = torch.zeros(20)
    for number in range(4):
        moved = end if number == 0 else start
        update = encode_update(moved, start, TOP_K, left_out=left, generator=torch.Generator())
        arrived[update.sent["index/w"].long()] += update.sent["w"]
        left = update.left_out
    assert torch.equal(arrived.reshape(4, 5), end["w"])
    assert not left["w"].any()


@CODINGS
def test_the_mean_of_coded_updates_is_the_mean_of_what_they_decode_to(
    tmp_path: Path, transfer: TransferSection
) -> None:
    start = state(0)
    model = write(tmp_path, "start", start)
    ends = [{n: t + state(k, 0.01)[n] for n, t in start.items()} for k in (3, 4, 5)]
    paths = []
    for k, end in enumerate(ends):
        (tmp_path / str(k)).mkdir()
        paths.append(coded(tmp_path / str(k), start, end, transfer))
    request = MergeRequest(
        round=1,
        model=model,
        updates=[SiteUpdate(path, SiteReport(f"s{k}", k + 1)) for k, path in enumerate(paths)],
        local_tensors=(),
        out=tmp_path / "merged",
        transfer=transfer,
    )
    result = merge_updates(request, lambda reports: [float(r.num_examples) for r in reports])
    assert result.accepted == ("s0", "s1", "s2")
    merged, decoded = load_tensors(tmp_path / "merged"), [read_update(p, model, transfer) for p in paths]
    for name in ("conv.weight", "fc.weight", "fc.bias"):
        mean = sum(d[name].double() * w for d, w in zip(decoded, (1 / 6, 2 / 6, 3 / 6), strict=True))
        assert torch.allclose(merged[name], torch.as_tensor(mean).float(), rtol=0, atol=1e-8)


def test_extras_of_a_strategy_are_coded_against_zero(tmp_path: Path) -> None:
    start = {"w": torch.ones(2, 3)}
    sent = encode_update(
        {"w": torch.ones(2, 3), "aux/c/w": torch.full((2, 3), 0.5)}, start, BF16,
        left_out={}, generator=torch.Generator(),
    ).sent  # fmt: skip
    model, path = TensorFile.open(write(tmp_path, "m", start)), write(tmp_path, "u", sent)
    expected = TensorManifest.of(specs_of({"w": torch.ones(2, 3), "aux/c/w": torch.ones(2, 3)}))
    source = open_update(path, expected, model, BF16, "site-1 round 1")
    spec = next(spec for spec in expected.tensors if spec.name == "aux/c/w")
    assert source.whole(spec).tolist() == [0.5] * 6


@pytest.mark.parametrize(
    "places", [[0, 0], [1, 0], [-1, 2], [3, 6]], ids=["twice", "falling", "below", "beyond"]
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, places: list[int]) -> None:
    start = {"w": torch.zeros(2, 3)}
    update = {"w": torch.ones(2), "index/w": torch.tensor(places, dtype=torch.int32)}
    model = TensorFile.open(write(tmp_path, "m", start))
    with pytest.raises(
        LearningError, match="site-1 round 2: tensor 'index/w' does not name ascending places from 0 to 5"
    ):
        open_update(write(tmp_path, "u", update), model.manifest, model, TOP_K, "site-1 round 2")


def test_an_update_that_is_not_coded_as_the_plan_says_is_refused(tmp_path: Path) -> None:
    start = {"w": torch.zeros(2, 3)}
    path = write(tmp_path, "m", start)
    with pytest.raises(TensorMismatchError, match="'w' has dtype F32, expected BF16"):
        open_update(path, TensorFile.open(path).manifest, TensorFile.open(path), BF16, "site-1 round 2")


def test_a_plan_names_its_coding_or_is_refused() -> None:
    document = {"name": "p", "rounds": 1, "model": {"name": "cnn", "classes": 2, "input": [1, 8, 8]}}
    assert validate_plan(document).transfer == LOSSLESS
    assert validate_plan({**document, "transfer": {"updates": "int8"}}).transfer == INT8
    with pytest.raises(PlanError, match="transfer.updates"):
        validate_plan({**document, "transfer": {"updates": "zip"}})
