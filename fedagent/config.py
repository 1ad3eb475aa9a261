"""agent.toml, and where things lie in the agent's home."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from fedcore.config import ConfigSection, load_config
from fedcore.metrics_port import MetricsConfig
from fedcore.plan import Options


class DataConfig(ConfigSection):
    """Which images this site trains on.

    `kind` names a reader: npz, folder, csv, medmnist, or a plug-in of the entry point `fedimpres.datasets`.
    `class_names` names the numbers that an npz file uses as labels; folders and CSV files carry names themselves.
    """

    kind: str = "npz"
    path: str | None = None
    class_names: tuple[str, ...] | None = None
    # Lets the reader `medmnist` fetch its file (checked by MD5) when it is not there.
    allow_download: bool = False
    # Shares of the training images held out where the data has no such split of its own.
    validation_fraction: float = Field(0.1, ge=0, lt=0.5)
    test_fraction: float = Field(0.2, ge=0, lt=0.5)
    options: Options = Field(default_factory=dict)


class ComputeConfig(ConfigSection):
    """Where training runs. `threads` = 0 leaves the choice to PyTorch."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(0, ge=0, le=1024)


class PolicyConfig(ConfigSection):
    """What this site allows."""

    # Per-class counts of held-out images are the site's class histogram: private unless said otherwise.
    share_class_metrics: bool = False


class PrivacyConfig(ConfigSection):
    """How this site guards its images. Its own choice: no plan changes it."""

    # Before training on impressions, compare them with this site's images and refuse those that come too near one.
    check_impressions: bool = True


class AgentConfig(ConfigSection):
    """agent.toml."""

    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    policy: PolicyConfig = PolicyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    metrics: MetricsConfig = MetricsConfig()
    # HTTP CONNECT proxy, "http://HOST:PORT"; the environment's is never used.
    proxy: str | None = None
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    reconnect_max_s: float = Field(30.0, gt=0)


@dataclass(frozen=True, slots=True)
class AgentHome:
    """Paths below the agent's home folder."""

    root: Path

    @property
    def config(self) -> Path:
        """agent.toml."""
        return self.root / "agent.toml"

    @property
    def credential(self) -> Path:
        """The site's credential folder."""
        return self.root / "credential"

    @property
    def enrolling(self) -> Path:
        """Key and terms of a request to be let in that is not decided yet."""
        return self.root / "enrolling"

    @property
    def artifacts(self) -> Path:
        """Fetched models and impressions, and updates not yet delivered."""
        return self.root / "artifacts"

    @property
    def tasks(self) -> Path:
        """Finished training, answered from here when it is asked for again."""
        return self.root / "tasks"

    @property
    def local_state(self) -> Path:
        """What the site keeps between rounds, a folder a run: FedBN's layers, the model scored last, statistics given."""
        return self.root / "local"

    @property
    def policy(self) -> Path:
        """policy.toml: what this site allows."""
        return self.root / "policy.toml"

    @property
    def paused(self) -> Path:
        """There while this site is paused."""
        return self.root / "paused"

    @property
    def status(self) -> Path:
        """What the running agent last said of itself."""
        return self.root / "status.json"

    @property
    def audit(self) -> Path:
        """The site's audit log."""
        return self.root / "audit.db"

    @property
    def lock(self) -> Path:
        """Held by the one agent that serves this home."""
        return self.root / "lock"


def load_agent_config(places: AgentHome, data: Path | None) -> AgentConfig:
    """agent.toml, with the data's path replaced if one is given."""
    config = load_config(places.config, AgentConfig)
    if data is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(data.resolve())})})
