"""Names of what BatchNorm layers store for inference: the running mean and variance that one of them has in a state dict.

No torch here: the control process checks statistics by their names too.
"""

from fedcore.tensor_file import EXTRA_PREFIX

_MEAN, _VARIANCE = "running_mean", "running_var"


def statistic_names(layer: str) -> tuple[str, str]:
    """State-dict names of the stored mean and variance of the BatchNorm layer with this module name."""
    prefix = f"{layer}." if layer else ""
    return prefix + _MEAN, prefix + _VARIANCE


def variance_partner(name: str) -> str | None:
    """The tensor that holds the mean to which the running variance `name` belongs; None for other tensors.

    What a strategy adds to an update (`aux/...`) is no statistic, whatever it is called.
    """
    layer, _, last = name.rpartition(".")
    if last != _VARIANCE or name.startswith(EXTRA_PREFIX):
        return None
    return statistic_names(layer)[0]
