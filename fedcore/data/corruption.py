"""Counting the images that can't be read against the plan's budget."""

import math

from fedcore.errors import CorruptImagesError
from fedcore.plan import Plan

_NAMED = 5


class CorruptionTally:
    """Unreadable images so far. `check` compares them with what the plan allows."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._examples: list[str] = []
        self.count = 0

    def add(self, name: str, reason: str) -> None:
        """Count one image; the first few are remembered for the message."""
        self.count += 1
        if len(self._examples) < _NAMED:
            self._examples.append(f"{name}: {reason}")

    def check(self, total: int, plan: Plan) -> int:
        """The count, if within the plan's `data.max_corrupt_fraction` of `total`; else CorruptImagesError."""
        allowed = math.floor(plan.data.max_corrupt_fraction * total + 1e-9)
        if self.count <= allowed:
            return self.count
        more = f" and {self.count - _NAMED} more" if self.count > _NAMED else ""
        raise CorruptImagesError(
            f"{self._who}: {self.count} of {total} images can't be read, at most {allowed} allowed: "
            f"{'; '.join(self._examples)}{more}",
            hint="repair or remove these images, or raise the plan's [data] max_corrupt_fraction",
        )
