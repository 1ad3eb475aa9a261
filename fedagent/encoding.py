"""The site's half of fewer bytes: an update as the coded difference to the global model (`fedcore.update_coding`).

What top-k leaves out is not lost: it stays at the site and is added to the next round's difference (error feedback).

Sources: Alistarh et al. 2017, QSGD, arXiv:1610.02132, for stochastic rounding; Aji & Heafield 2017, arXiv:1704.05021,
for the largest differences; Karimireddy et al. 2019, arXiv:1901.09847, for error feedback.

Legend: E elements of a tensor, C its first dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.models.state_file import specs_of
from fedcore.plan import TransferSection
from fedcore.update_coding import INDEX_PREFIX, SCALE_PREFIX, is_coded, kept_count

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class EncodedUpdate:
    """What travels, and what stays at the site for the next round."""

    sent: dict[str, Tensor]
    left_out: dict[str, Tensor]


def encode_update(
    update: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    transfer: TransferSection,
    *,
    left_out: Mapping[str, Tensor],
    generator: torch.Generator,
) -> EncodedUpdate:
    """Code the tensors of an update, on the CPU.

    `start` is what the site started from (a name that it lacks counts as zeros), `left_out` what the round before left
    here. The same generator gives the same bytes.
    """
    sent: dict[str, Tensor] = {}
    remaining: dict[str, Tensor] = {}
    for spec in specs_of(update):
        name, tensor = spec.name, update[spec.name]
        if not is_coded(spec, transfer):
            sent[name] = tensor
            continue
        delta = tensor.float() - start[name].float() if name in start else tensor.float()
        match transfer.updates:
            case "int8":
                sent[name], sent[SCALE_PREFIX + name] = rounded_to_int8(delta, generator)
            case "top_k":
                if name in left_out:
                    delta = delta + left_out[name]
                values, places = largest(delta, kept_count(spec, transfer))
                sent[name], sent[INDEX_PREFIX + name] = values, places
                remaining[name] = delta.flatten().index_fill(0, places.long(), 0.0).reshape(delta.shape)
            case _:
                sent[name] = delta.bfloat16()
    return EncodedUpdate(sent, remaining)


def rounded_to_int8(delta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`delta` [C, ...] in steps of its own a channel: I8 of its shape, and the steps, F32 [C].

    Rounded up or down at random so that the expected value is `delta`.
    """
    flat_CE = delta.reshape(len(delta), -1)
    step_C = flat_CE.abs().amax(1) / _LARGEST
    scaled_CE = flat_CE / step_C.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    noise_CE = torch.rand(scaled_CE.shape, generator=generator)
    rounded_CE = (scaled_CE + noise_CE).floor_().clamp_(-_LARGEST, _LARGEST)
    return rounded_CE.to(torch.int8).reshape(delta.shape), step_C


def largest(delta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` numbers of largest size, F32 [count], and where they stand in the flat tensor, I32, ascending."""
    flat_E = delta.flatten()
    places = flat_E.abs().topk(count).indices.sort().values
    return flat_E[places], places.int()
