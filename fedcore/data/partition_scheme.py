"""How images are dealt over sites, written as one text: METHOD[:PARAMETER][+feature_shift[:STRENGTH]].

| text | what sites differ in |
|---|---|
| `iid` | nothing |
| `dirichlet:ALPHA` | classes; the smaller ALPHA, the more |
| `shards:N` (2) | classes: N shards of images sorted by class for each site |
| `quantity:ALPHA` (0.5) | how many images they have |
| `by_site` | the real sites of a data set that has such |
| `feature_shift:STRENGTH` (1) | stain, brightness, blur and noise; alone or after any of the others and a `+` |

In brackets what a text without the number means. No torch.
"""

import math
from dataclasses import dataclass

from fedcore.data import partition
from fedcore.data.dataset import IndexArray, LabelArray
from fedcore.errors import ConfigError

IID, DIRICHLET, SHARDS, QUANTITY, BY_SITE = "iid", "dirichlet", "shards", "quantity", "by_site"
METHODS = (DIRICHLET, IID, SHARDS, QUANTITY, BY_SITE)
FEATURE_SHIFT = "feature_shift"
DEFAULT_SHARDS, DEFAULT_SIZE_ALPHA, DEFAULT_STRENGTH = 2, 0.5, 1.0
MAX_STRENGTH = 5.0
_HINT = "for example dirichlet:0.1, iid, shards:2, quantity:0.5, by_site, shards:2+feature_shift:0.5"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to deal images. `parameter` is the method's number; `shift` the strength of a feature shift, 0 without."""

    method: str
    parameter: float | None = None
    shift: float = 0.0

    @property
    def text(self) -> str:
        """The one text that stands for this scheme, every number said."""
        base = self.method if self.parameter is None else f"{self.method}:{number_text(self.parameter)}"
        return f"{base}+{FEATURE_SHIFT}:{number_text(self.shift)}" if self.shift else base

    @property
    def alpha(self) -> float | None:
        """The Dirichlet label skew; None for any other method."""
        return self.parameter if self.method == DIRICHLET else None


def choose_scheme(text: str | None, alpha: float | None, *, dataset: str, real_sites: bool) -> Scheme:
    """The scheme that `--partition TEXT` and `--alpha ALPHA` ask for together, each None where not given.

    `real_sites` says that the data set is nothing but its own sites. Without a text, `alpha` means Dirichlet, and
    neither means `by_site` there and `iid` elsewhere. Raises ConfigError if the two contradict one another or the
    data set.
    """
    usual = Scheme(BY_SITE if real_sites else IID)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"alpha is {alpha}, expected a number above 0")
    scheme = usual if alpha is None else Scheme(DIRICHLET, alpha)
    if text is not None:
        scheme = _parse(text, usual, alpha)
    if real_sites and scheme.method != BY_SITE:
        raise ConfigError(
            f"{dataset} is dealt by its real sites (by_site), got {scheme.text}",
            hint="leave --partition and --alpha out; by_site+feature_shift:1 is possible",
        )
    return scheme


def scheme_of(text: str) -> Scheme:
    """Read a scheme's own `text` back. Raises ConfigError."""
    return _parse(text, Scheme(IID), None)


def deal(scheme: Scheme, labels: LabelArray, num_sites: int, *, seed: int) -> list[IndexArray]:
    """Deal images with these labels [N]: a sorted index array a site. The feature shift is not its business.

    Raises DataError if they can't be dealt so. `by_site` has nothing to deal.
    """
    assert scheme.method != BY_SITE
    if scheme.method == IID:
        return partition.iid(labels, num_sites, seed=seed)
    assert scheme.parameter is not None
    if scheme.method == DIRICHLET:
        return partition.dirichlet(labels, num_sites, scheme.parameter, seed=seed)
    if scheme.method == SHARDS:
        return partition.shards(labels, num_sites, shards_per_site=int(scheme.parameter), seed=seed)
    return partition.quantity_skew(labels, num_sites, scheme.parameter, seed=seed)


def _parse(text: str, usual: Scheme, alpha: float | None) -> Scheme:
    base_text, plus, shift_text = text.strip().partition("+")
    if not plus and base_text.partition(":")[0] == FEATURE_SHIFT:
        # Alone, it lies on what --alpha says, or else on the usual split.
        base = usual if alpha is None else Scheme(DIRICHLET, alpha)
        shift_text = base_text
    else:
        base = _base(base_text, text, alpha)
    if not shift_text and not plus:
        return base
    name, _, number = shift_text.partition(":")
    if name != FEATURE_SHIFT:
        raise ConfigError(
            f"partition {text!r}: '{name}' after '+', only {FEATURE_SHIFT} may stand there", hint=_HINT
        )
    strength = _number(number, text, DEFAULT_STRENGTH, most=MAX_STRENGTH)
    return Scheme(base.method, base.parameter, strength)


def _base(base_text: str, text: str, alpha: float | None) -> Scheme:
    method, colon, number = base_text.partition(":")
    if method not in METHODS:
        known = ", ".join((*METHODS, FEATURE_SHIFT))
        raise ConfigError(f"partition {text!r}: '{method}' is unknown, known: {known}", hint=_HINT)
    if alpha is not None and method != DIRICHLET:
        raise ConfigError(
            f"partition {text!r} contradicts alpha {alpha:g}: alpha is the label skew of dirichlet",
            hint="leave one of the two out",
        )
    if method in (IID, BY_SITE):
        if colon:
            raise ConfigError(f"partition {text!r}: {method} takes no number", hint=_HINT)
        return Scheme(method)
    if method == DIRICHLET:
        found = _number(number, text, alpha) if colon or alpha is not None else None
        if found is None:
            raise ConfigError(
                f"partition {text!r}: dirichlet needs its alpha", hint="for example dirichlet:0.1"
            )
        if alpha is not None and found != alpha:
            raise ConfigError(
                f"partition {text!r} contradicts alpha {alpha:g}", hint="leave one of the two out"
            )
        return Scheme(DIRICHLET, found)
    if method == QUANTITY:
        return Scheme(QUANTITY, _number(number, text, DEFAULT_SIZE_ALPHA))
    count = _number(number, text, DEFAULT_SHARDS)
    if count != int(count):
        raise ConfigError(f"partition {text!r}: expected a whole number of shards a site, got {number}")
    return Scheme(SHARDS, count)


def _number(number: str, text: str, default: float | None, *, most: float = 1e6) -> float:
    if not number and default is not None:
        return float(default)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise ConfigError(
            f"partition {text!r}: {number!r} is not a number above 0 and at most {most:g}", hint=_HINT
        )
    return value


def number_text(value: float) -> str:
    """A number as people write it, read back to the same bits: "2", "0.1"."""
    return str(int(value)) if value == int(value) else repr(value)
