"""Whether the global model is good enough to be worth remembering. Pure and without torch.

Impressions give back what the model knows: made too early they remind the sites of its mistakes (measured:
impressions from the first rounds of a bad model cost more than they bring).
"""

from dataclasses import dataclass
from typing import Literal

from fedserver.synthesis.options import SynthesisOptions

# The way from chance to perfect that "auto" asks for: with eight classes an accuracy of 0.34.
WORTH_REMEMBERING = 0.25


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to make impressions now, and why: `reason` reads well in a log."""

    ready: bool
    reason: str


def ready(
    validation_accuracy: float | None,
    classes: int,
    options: SynthesisOptions,
    *,
    warmup: int | Literal["auto"] = "auto",
    has_bank: bool = False,
) -> Decision:
    """Decide from the validated accuracy (balanced where known) of the newest model that has one.

    `warmup` is the plan's: a number of rounds is the operator's word, and "auto" waits for nothing more then.

    The threshold is relative to chance: 1/classes + worth_remembering * (1 - 1/classes). Once there is a bank
    it is kept up, whatever a single round's accuracy; without a figure nothing is held back.
    """
    worth = options.worth_remembering
    if worth == "auto" and warmup != "auto":
        return Decision(True, f"the plan's warm-up of {warmup} rounds is over")
    share = WORTH_REMEMBERING if worth == "auto" else float(worth)
    threshold = 1 / classes + share * (1 - 1 / classes)
    if has_bank:
        return Decision(True, "there is a bank to keep up")
    if share == 0:
        return Decision(True, "worth_remembering is 0: nothing to wait for")
    if validation_accuracy is None:
        return Decision(True, "no validated accuracy to wait for")
    told = f"validated accuracy {validation_accuracy:.3f}, worth remembering from {threshold:.3f}"
    if validation_accuracy < threshold:
        return Decision(False, f"synthesis waits: {told} ({classes} classes)")
    return Decision(True, told)
