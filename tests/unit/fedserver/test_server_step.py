"""Server halves of strategies on one or two scalar parameters, each figure worked out by hand."""

import math

import pytest
import torch

from fedcore.errors import EmptyRoundError, LearningError, PlanError
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan
from fedcore.tensor_file import TensorSpec
from fedserver.aggregation import average_over_rounds, merge_updates
from fedserver.strategies import load_strategy
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate

COUNTS = {"a": 1, "b": 3}


def strategy_for(name, *, training=None, **options):
    return load_strategy(
        Plan(
            name="p", rounds=3, strategy=name, strategy_options=options,
            model={"name": "cnn", "classes": 4, "input": (1, 8, 8)}, training=training or {},
        )
    )  # fmt: skip


def scalars(**values):
    return {name: torch.tensor([float(value)]) for name, value in values.items()}


class Server:
    """Rounds of one strategy over the parameter `w` and the buffer `seen`."""

    def __init__(self, folder, strategy, start, num_sites=2):
        self.folder, self.strategy, self.num_sites, self.round = folder, strategy, num_sites, 0
        self.state = None
        save_state(folder / "model-0", scalars(w=start, seen=0))

    def step(self, ends, extras=None, counts=COUNTS):
        """Merge updates in which `w` ended at `ends[site]`; returns the new w and the state's scalars."""
        self.round += 1
        specs = [TensorSpec("w", "F32", (1,)), TensorSpec("seen", "F32", (1,))]
        updates = []
        for site, end in ends.items():
            path = self.folder / f"{site}-{self.round}"
            beside = {f"aux/variate/{n}": t for n, t in scalars(w=extras[site]).items()} if extras else {}
            save_state(path, scalars(w=end, seen=end) | beside)
            updates.append(SiteUpdate(path, SiteReport(site, counts[site])))
        request = MergeRequest(
            self.round, self.folder / f"model-{self.round - 1}", updates, (), self.folder / f"model-{self.round}",
            extras=self.strategy.update_extras(specs, {"w"}), parameters={"w"}, state=self.state,
            state_out=self.folder / f"state-{self.round}", num_sites=self.num_sites,
        )  # fmt: skip
        result = self.strategy.merge(request)
        model = load_tensors(request.out)
        assert result.digest == save_state(self.folder / "check", model)
        kept = {}
        if result.state_digest is not None:
            self.state = request.state_out
            kept = load_tensors(self.state)
            assert result.state_digest == save_state(self.folder / "check", kept)
        self.seen = model["seen"].item()
        return model["w"].item(), {name: tensor.item() for name, tensor in kept.items()}


def test_fedavg_and_its_uniform_twin(tmp_path):
    assert Server(tmp_path, strategy_for("fedavg"), 0).step({"a": 1, "b": 5})[0] == 4.0
    assert Server(tmp_path, strategy_for("fedavg_uniform"), 0).step({"a": 1, "b": 5})[0] == 3.0


def test_server_momentum(tmp_path):
    server = Server(tmp_path, strategy_for("fedopt", beta1=0.5, server_learning_rate=2.0), 1.0)
    # Mean 4: m = 3, w = 1 + 2 * 3.
    assert server.step({"a": 1, "b": 5}) == (7.0, {"first_moment/w": 3.0})
    assert server.seen == 4.0  # a buffer keeps its mean
    # Mean 7, no change: m = 0.5 * 3, w = 7 + 2 * 1.5.
    assert server.step({"a": 7, "b": 7}) == (10.0, {"first_moment/w": 1.5})


def test_momentum_without_memory_is_fedavg(tmp_path):
    server = Server(tmp_path, strategy_for("fedopt", beta1=0.0), 1.0)
    assert server.step({"a": 1, "b": 5})[0] == 4.0


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("adagrad", 0.25 + 9.0),
        ("adam", 0.9 * 0.25 + 0.1 * 9.0),
        # v - (1 - beta2) * d^2 * sign(v - d^2), with v < d^2.
        ("yogi", 0.25 + 0.1 * 9.0),
    ],
)
def test_adaptive_servers(tmp_path, kind, second):
    server = Server(
        tmp_path,
        strategy_for(
            "fedopt", server_optimizer=kind, server_learning_rate=0.1, beta1=0.8, beta2=0.9, adaptivity=0.5
        ),
        1.0,
    )
    # Change 3, squared 9; the second moment starts at 0.5^2.
    moved, kept = server.step({"a": 1, "b": 5})
    assert kept["first_moment/w"] == pytest.approx(0.6)
    assert kept["second_moment/w"] == pytest.approx(second)
    assert moved == pytest.approx(1 + 0.1 * 0.6 / (math.sqrt(second) + 0.5))


def test_scaffold_moves_its_variate_by_the_share_that_took_part(tmp_path):
    server = Server(tmp_path, strategy_for("scaffold", server_learning_rate=0.5), 0.0, num_sites=4)
    # Weights 1/4 and 3/4: mean 4, half a step to it; changes 2 and 6 have mean 5, two sites of four took part.
    assert server.step({"a": 1, "b": 5}, {"a": 2, "b": 6}) == (2.0, {"variate/w": 2.5})
    # Site a alone: mean -2, changes -4, one site of four.
    assert server.step({"a": -2}, {"a": -4}) == (0.0, {"variate/w": 1.5})


def test_scaffold_uniform_is_the_papers(tmp_path):
    server = Server(tmp_path, strategy_for("scaffold", weighting="uniform"), 0.0)
    assert server.step({"a": 1, "b": 5}, {"a": 2, "b": 6}) == (3.0, {"variate/w": 4.0})


def test_scaffold_needs_sgd():
    with pytest.raises(PlanError, match=r"training.optimizer is 'adam', expected 'sgd'"):
        strategy_for("scaffold", training={"optimizer": "adam"})


def test_an_update_without_its_extras_or_with_nan_in_them_is_refused(tmp_path):
    server = Server(tmp_path, strategy_for("scaffold"), 0.0)
    with pytest.raises(EmptyRoundError, match=r"tensor 'aux/variate/w' is missing"):
        server.step({"a": 1})
    (tmp_path / "model-1").write_bytes((tmp_path / "model-0").read_bytes())
    with pytest.raises(EmptyRoundError, match=r"a round 2: tensor 'aux/variate/w' holds NaN or Inf"):
        server.step({"a": 1}, {"a": math.nan})
    assert not list(tmp_path.glob("*.mean")) + list(tmp_path.glob("*.extras"))


def test_a_step_beyond_the_dtype_is_told(tmp_path):
    server = Server(tmp_path, strategy_for("fedopt", server_learning_rate=1e38), 0.0)
    with pytest.raises(LearningError, match=r"step on tensor 'w' gives NaN or Inf") as caught:
        server.step({"a": 100, "b": 100})
    assert "server_learning_rate" in caught.value.hint


def test_extras_are_left_aside_by_a_strategy_that_does_not_merge_them(tmp_path):
    extras = [TensorSpec("aux/x/bn.running_var", "F32", (1,))]
    # A negative number is no variance, but this is no variance either.
    for site in COUNTS:
        save_state(tmp_path / site, scalars(w=1) | {"aux/x/bn.running_var": torch.tensor([-1.0])})
    save_state(tmp_path / "global", scalars(w=0))
    updates = [SiteUpdate(tmp_path / site, SiteReport(site, n)) for site, n in COUNTS.items()]
    request = MergeRequest(1, tmp_path / "global", updates, (), tmp_path / "out", extras=extras)
    result = merge_updates(request, lambda reports: [1.0, 1.0], extras_out=tmp_path / "extras")
    assert result.accepted == ("a", "b")
    assert set(load_tensors(tmp_path / "out")) == {"w"}
    assert load_tensors(tmp_path / "extras")["aux/x/bn.running_var"].item() == -1.0


def test_average_over_rounds(tmp_path):
    norm = {"bn.running_mean": 2.0, "bn.running_var": 4.0}
    save_state(tmp_path / "a", scalars(w=1, own=1, **norm) | {"n": torch.tensor([9])})
    save_state(tmp_path / "b", scalars(w=5, own=5, **dict.fromkeys(norm, 8.0)) | {"n": torch.tensor([7])})
    digest = average_over_rounds(tmp_path / "a", tmp_path / "b", 0.75, ["own"], tmp_path / "out")
    found = load_tensors(tmp_path / "out")
    assert digest == save_state(tmp_path / "check", found)
    # The variance is averaged like a weight: no spread of the means is added. Integers take the maximum.
    assert {name: tensor.item() for name, tensor in found.items()} == {
        "w": 2.0, "own": 5.0, "bn.running_mean": 3.5, "bn.running_var": 5.0, "n": 9,
    }  # fmt: skip
