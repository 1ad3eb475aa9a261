"""Architectures: shapes, norms, determinism, options; and state dicts as canonical files."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedcore.errors import ConfigError, PlanError, StorageError, TensorMismatchError
from fedcore.models import build_model, model_names
from fedcore.models.base import FederatedModel, check_model, group_count, norm_tensor_names
from fedcore.models.state_file import load_intact, load_tensors, save_state, specs_of
from fedcore.plan import ModelSection
from fedcore.tensor_file import TensorSpec

torch.set_num_threads(1)


def section(name: str, size: tuple[int, int, int] = (3, 28, 28), **more: Any) -> ModelSection:
    return ModelSection.model_validate({"name": name, "classes": 5, "input": size, **more})


SMALL: Mapping[str, dict[str, Any]] = {
    "cnn": {"options": {"width": 8}},
    "resnet18": {"options": {"width": 8}},
    "alexnet_bn": {"options": {"hidden": 32}},
    "noop": {"options": {"params": 5000}},
}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cnn", (1, 8, 8)), ("cnn", (3, 28, 28)), ("cnn", (1, 33, 50)), ("resnet18", (3, 8, 8)),
        ("resnet18", (3, 28, 28)), ("resnet18", (1, 96, 80)), ("alexnet_bn", (3, 64, 64)),
        ("alexnet_bn", (1, 128, 100)), ("noop", (3, 28, 28)),
    ],
)  # fmt: skip
def test_logits_are_the_head_of_the_features(name: str, size: tuple[int, int, int], norm: str) -> None:
    torch.manual_seed(0)
    model = build_model(section(name, size, norm=norm, **SMALL[name]))
    images = torch.randn(4, *size)
    assert model.training
    model(images).sum().backward()
    assert model.head.weight.grad is not None
    assert (model.head.weight.grad.abs().sum() > 0).item()
    model.eval()
    features = model.features(images)
    assert features.shape == (4, model.head.in_features)
    assert model(images).shape == (4, 5)
    assert torch.equal(model(images), model.head(features))
    kinds = {type(m) for m in model.modules()}
    assert not (kinds & {nn.BatchNorm2d, nn.BatchNorm1d} if norm == "group" else kinds & {nn.GroupNorm})


@pytest.mark.parametrize("name", model_names())
def test_weights_follow_torchs_global_seed(name: str) -> None:
    size = (3, 64, 64) if name == "alexnet_bn" else (3, 28, 28)
    torch.manual_seed(7)
    first = build_model(section(name, size, **SMALL[name])).state_dict()
    torch.manual_seed(7)
    again = build_model(section(name, size, **SMALL[name])).state_dict()
    other = build_model(section(name, size, **SMALL[name])).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_resnet18_has_the_papers_size_and_stem_by_image_size() -> None:
    small = build_model(section("resnet18", (3, 32, 32)))
    large = build_model(section("resnet18", (3, 224, 224)))
    # torchvision's resnet18 with 5 classes has 11,179,077 parameters.
    assert sum(p.numel() for p in large.parameters()) == 11_179_077
    assert small.conv1.weight.shape == (64, 3, 3, 3)
    assert large.conv1.weight.shape == (64, 3, 7, 7)
    images = torch.zeros(1, 3, 32, 32)
    assert small.layer1(small.maxpool(small.conv1(images))).shape[2:] == (32, 32)
    assert large.layer1(large.maxpool(large.conv1(images))).shape[2:] == (8, 8)


def test_alexnet_at_256_pixels_keeps_the_reference_layer_sizes() -> None:
    with torch.device("meta"):
        model = build_model(section("alexnet_bn", (3, 256, 256)))
        assert model.features(torch.empty(2, 3, 256, 256)).shape == (2, 4096)


@pytest.mark.parametrize("params", [15, 5000, 1_000_000, 11_700_000])
def test_noop_has_exactly_the_parameters_asked_for(params: int) -> None:
    model = build_model(section("noop", (2, 8, 8), options={"params": params}))
    sizes = [p.numel() for p in model.parameters()]
    assert sum(sizes) == params
    assert max(sizes) <= 2_400_000
    if params > 10_000_000:
        assert len(sizes) > 20


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (section("cnn", options={"widht": 3}), r"no option 'widht', known: grid, width"),
        (section("cnn", options={"width": "wide"}), r"model\.options\.width: .*got 'wide'"),
        (section("cnn", options={"width": 0}), r"at least 1, got 0"),
        (section("cnn", (3, 7, 28)), r"needs at least 8 px"),
        (section("alexnet_bn", (3, 63, 64)), r"needs at least 64 px"),
        (section("noop", options={"params": 19}), r"at least 20 \(the head alone\)"),
    ],
)
def test_impossible_plans_are_refused(bad: ModelSection, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_model(bad)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'vgg', known: alexnet_bn, cnn, noop, resnet18"):
        build_model(section("vgg"))


def test_a_builder_that_makes_something_else_is_refused() -> None:
    class Headless(FederatedModel):
        pass

    model = Headless()
    with pytest.raises(ConfigError, match="expected a subclass of FederatedModel"):
        check_model(nn.Linear(2, 5), section("mine"))
    with pytest.raises(ConfigError, match="head is a NoneType"):
        check_model(model, section("mine"))
    model.head = nn.Linear(2, 4)
    with pytest.raises(ConfigError, match=r"head has 4 outputs, expected classes = 5"):
        check_model(model, section("mine"))


def test_norm_tensor_names_are_those_of_the_norm_layers() -> None:
    model = build_model(section("cnn", **SMALL["cnn"]))
    expected = [
        f"norm{n}.{part}"
        for n in (1, 2, 3)
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert norm_tensor_names(model) == expected
    grouped = build_model(section("resnet18", norm="group", **SMALL["resnet18"]))
    names = norm_tensor_names(grouped)
    assert "bn1.weight" in names
    assert "layer2.0.downsample.1.bias" in names
    assert not any("conv" in name or "head" in name for name in names)
    assert len(names) == 2 * sum(isinstance(m, nn.GroupNorm) for m in grouped.modules())


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 1), (16, 2), (64, 8), (512, 32), (4096, 32), (100, 4), (7, 1)]
)
def test_group_count_divides_and_leaves_eight_channels(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "w": torch.randn(3, 4),
        "strided": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
        "half": torch.randn(5).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "images": torch.randint(0, 255, (2, 1, 3, 3), dtype=torch.uint8),
    }


def test_a_saved_state_opens_with_plain_safetensors_and_hashes_to_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state = tensors()
    digest = save_state(path, state)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for loaded in (load_file(path), load_tensors(path)):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert save_state(tmp_path / "reversed", dict(reversed(state.items()))) == digest


def test_what_is_read_is_what_the_digest_names_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    state = tensors()
    digest = save_state(path, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_intact(path, digest).items())
    whole = path.read_bytes()
    for damaged in (whole[:-1] + b"!", whole.replace(b'"half"', b'"hald"'), whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"m\.safetensors"):
            load_intact(path, digest)
    path.unlink()
    with pytest.raises(StorageError, match=r"m\.safetensors"):
        load_intact(path, digest)


def test_the_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; torch.manual_seed(3)\n"
        "from fedcore.models import build_model; from fedcore.models.state_file import save_state\n"
        "from fedcore.plan import ModelSection\n"
        "m = build_model(ModelSection(name='cnn', classes=3, input=(1, 8, 8)))\n"
        "print(save_state(Path(sys.argv[1]), m.state_dict()))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"{seed}.safetensors")],
            check=True, capture_output=True, text=True, timeout=270, env={"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_specs_of_names_dtypes_and_refuses_odd_ones() -> None:
    specs = specs_of({"half": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(1)})
    assert specs == [TensorSpec("half", "BF16", (2,)), TensorSpec("n", "I64", ())]
    with pytest.raises(TensorMismatchError, match=r"'z' has dtype torch\.complex64"):
        specs_of({"z": torch.zeros(1, dtype=torch.complex64)})


def test_other_writers_files_load_only_where_allowed(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(StorageError, match="canonical"):
        load_tensors(path)
    assert torch.equal(load_tensors(path, canonical=False)["a"], torch.ones(2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StorageError, match="not a safetensors file"):
        load_tensors(path, canonical=False)
