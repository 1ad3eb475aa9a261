"""policy.toml: what this site allows, whatever the coordinator asks for. Pure decisions with a reason in words.

The agent holds to it before any task starts, and the coordinator has no way round it: it hears the reason and goes on
without this site. Without the file everything is allowed that is installed here, and no log is shared. A file that is
wrong keeps the agent from starting: a rule that was misspelt must not become a permission.
"""

from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, StringConstraints, field_validator, model_validator

from fedcore.config import ConfigSection, load_config
from fedcore.plan import PositiveFloat, plan_from_json

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Entry = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class WorkingHours(ConfigSection):
    """When this site works for the federation. A window that passes midnight belongs to the day on which it begins.

    `timezone` is a name such as "Europe/Zurich"; without it the machine's own counts.
    """

    begin: time
    end: time
    days: tuple[Day, ...] = Field(DAYS, min_length=1)
    timezone: str | None = None

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ZoneInfo(value)
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                raise ValueError("is no time zone of this machine's (an example: Europe/Zurich)") from error
        return value

    @model_validator(mode="after")
    def _a_window(self) -> Self:
        if self.begin.tzinfo is not None or self.end.tzinfo is not None:
            raise ValueError("begin and end are times of day without an offset; say timezone = ...")
        if self.begin == self.end:
            raise ValueError(
                f"working_hours begin and end at {self.begin:%H:%M}; leave the section out for all day"
            )
        return self

    def contain(self, moment: datetime) -> bool:
        """Whether the window is open at `moment`, which has a time zone."""
        local = moment.astimezone(ZoneInfo(self.timezone) if self.timezone else None)
        today, at = DAYS[local.weekday()], local.time()
        if self.begin < self.end:
            return today in self.days and self.begin <= at < self.end
        yesterday = DAYS[(local - timedelta(days=1)).weekday()]
        return (today in self.days and at >= self.begin) or (yesterday in self.days and at < self.end)

    def __str__(self) -> str:
        """As people write it: mon,tue 18:00-06:00 Europe/Zurich."""
        days = "every day" if set(self.days) == set(DAYS) else ",".join(d for d in DAYS if d in self.days)
        return f"{days} {self.begin:%H:%M}-{self.end:%H:%M} {self.timezone or 'local time'}"


class SitePolicy(ConfigSection):
    """policy.toml. A key that is absent forbids nothing, but for `share_logs`."""

    # Names as in a plan. `objectives` are the local halves of strategies: what really runs here.
    models: tuple[Entry, ...] | None = None
    strategies: tuple[Entry, ...] | None = None
    objectives: tuple[Entry, ...] | None = None
    # With fewer training images this site takes no part: a model tells more about few images than about many.
    min_images: int = Field(0, ge=0)
    max_epochs: int | None = Field(None, ge=1)
    # Computing for one round, training and evaluation each; what takes longer is ended.
    max_hours_per_round: PositiveFloat | None = None
    receive_impressions: bool = True
    # Whether BatchNorm statistics of merged models are measured on the images here, in runs that ask for it.
    recalibrate: bool = True
    # Whether people at this site may look at those that lie here (`fedagent impressions preview`).
    show_impressions: bool = True
    working_hours: WorkingHours | None = None
    # Both directions together, 10^6 bits a second.
    bandwidth_mbit_s: PositiveFloat | None = None
    # Whether operators may read the last lines of the agent's own log (fedagent.shared_log).
    share_logs: bool = False


def load_policy(path: Path) -> SitePolicy:
    """The policy of a home, the permissive one if there is no file. Raises ConfigError that names the keys."""
    return load_config(path, SitePolicy) if path.exists() else SitePolicy()


def refusal_now(policy: SitePolicy, moment: datetime, num_examples: int | None) -> str:
    """Why this site takes no work at all at `moment`, in words; empty if it does.

    `num_examples` counts the training images here, None while it is not known.
    """
    if policy.working_hours is not None and not policy.working_hours.contain(moment):
        return f"refuses: policy allows work {policy.working_hours} only"
    if num_examples is not None and num_examples < policy.min_images:
        # The site's count is not told beyond what the coordinator hears anyway.
        return f"refuses: policy asks for at least {policy.min_images} training images, there are fewer"
    return ""


def refusal_of_task(
    policy: SitePolicy,
    plan_json: str,
    *,
    objective: str | None,
    has_impressions: bool = False,
    recalibrates: bool = False,
) -> str:
    """Why this site does not do a task, in words; empty if it does.

    `objective` is None for an evaluation or a recalibration. Raises PlanError if a rule needs the plan and it can't be read.
    """
    if has_impressions and not policy.receive_impressions:
        return "refuses: policy forbids to receive impressions"
    if recalibrates and not policy.recalibrate:
        return "refuses: policy forbids to measure BatchNorm statistics of merged models"
    if objective is not None and (reason := _not_among("objective", objective, policy.objectives)):
        return reason
    if policy.models is None and policy.strategies is None and policy.max_epochs is None:
        return ""
    plan = plan_from_json(plan_json)
    epochs = plan.training.epochs
    if policy.max_epochs is not None and epochs > policy.max_epochs:
        return f"refuses: policy allows {policy.max_epochs} epochs a round, the plan has {epochs}"
    return _not_among("model", plan.model.name, policy.models) or _not_among(
        "strategy", plan.strategy, policy.strategies
    )


def policy_lines(policy: SitePolicy) -> list[str]:
    """The policy in force, one rule a line."""

    def names(allowed: tuple[str, ...] | None) -> str:
        return "all that are installed" if allowed is None else ", ".join(allowed) or "none"

    def limit(value: float | None, unit: str) -> str:
        return "no limit" if value is None else f"at most {value:g} {unit}"

    rules = {
        "models": names(policy.models),
        "strategies": names(policy.strategies),
        "objectives": names(policy.objectives),
        "training images": f"at least {policy.min_images}" if policy.min_images else "any number",
        "epochs": limit(policy.max_epochs, "a round"),
        "hours": limit(policy.max_hours_per_round, "a round"),
        "impressions": "received" if policy.receive_impressions else "not received",
        "statistics": "measured for runs that recalibrate" if policy.recalibrate else "not measured",
        "previews": "allowed here" if policy.show_impressions else "forbidden here",
        "working hours": str(policy.working_hours or "always"),
        "bandwidth": limit(policy.bandwidth_mbit_s, "Mbit/s"),
        "agent's log": "shared with operators" if policy.share_logs else "not shared",
    }
    return [f"{name:16} {said}" for name, said in rules.items()]


def _not_among(what: str, name: str, allowed: tuple[str, ...] | None) -> str:
    if allowed is None or name in allowed:
        return ""
    return f"refuses: policy forbids {what} '{name}' (allowed: {', '.join(allowed) or 'none'})"
