"""What a plan would ask of sites and coordinator: the schema of `fedctl run plan -o json`.

Bytes are payloads of tensors, from their real shapes. Seconds come from what earlier runs really took; where nothing was
measured they are null, and `not_measured` says what is missing.
"""

from pydantic import BaseModel, ConfigDict


class Sizes(BaseModel):
    """Artifacts of the plan, in bytes. `impressions` is a whole bank; `state` what the strategy keeps between rounds."""

    model_config = ConfigDict(frozen=True)

    model: int
    update: int
    impressions: int = 0
    state: int = 0


class SiteForecast(BaseModel):
    """One expected site. Bytes of a round are those of a round in full swing; totals are those of the run, at most."""

    model_config = ConfigDict(frozen=True)

    site: str
    fits: bool
    # Why it does not fit; empty if it does.
    why: str = ""
    connected: bool = False
    # Training images, as it says; null while it is not connected.
    num_examples: int | None = None
    bytes_up: int
    bytes_down: int
    total_bytes_up: int
    total_bytes_down: int
    # Measured in earlier runs, and what follows for a round of this plan.
    images_per_s: float | None = None
    bytes_per_s: float | None = None
    training_s: float | None = None
    transfer_s: float | None = None


class PlanForecast(BaseModel):
    """A dry run of a plan."""

    model_config = ConfigDict(frozen=True)

    name: str
    strategy: str
    rounds: int
    min_sites: int
    # Why it could not start as things are; empty if it could.
    blocked: str = ""
    # Runs that it would wait for.
    waits_for: list[str] = []
    sites: list[SiteForecast]
    sizes: Sizes
    # What the coordinator adds to a round: aggregating, recalibrating, evaluating, synthesising.
    coordinator_s: dict[str, float] = {}
    # Null while something of it was never measured.
    round_s: float | None = None
    run_s: float | None = None
    not_measured: list[str] = []
    # At the coordinator: for good, and while a round is under way.
    disk_kept_bytes: int
    disk_peak_bytes: int
    disk_free_bytes: int
    # What the storage quota leaves for it; null without a quota.
    quota_room_bytes: int | None = None
    # What looks unintended, one line each.
    odd: list[str] = []

    @property
    def fitting(self) -> int:
        """How many sites fit."""
        return sum(site.fits for site in self.sites)
