"""fedserver.toml, and where things lie in the coordinator's home."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedcore.config import ConfigSection
from fedcore.metrics_port import MetricsConfig
from fedcore.plan import Name

Port = Annotated[int, Field(ge=1, le=65535)]


class ComputeConfig(ConfigSection):
    """Where aggregation and synthesis run. `threads` = 0 leaves the choice to PyTorch."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(0, ge=0, le=1024)


class AdmissionConfig(ConfigSection):
    """How much the coordinator takes on at once."""

    max_agents: int = Field(2000, ge=1)
    # Chunks of 1 MiB that move at a time; transfers beyond that take turns.
    max_transfers: int = Field(4, ge=1)


class LimitsConfig(ConfigSection):
    """What one member, or one address at the enrolment port, may take. Whoever asks for more is refused for a while."""

    # Calls of one site or operator, on average; five seconds' worth at once.
    requests_per_s: float = Field(100.0, gt=0)
    # Calls of one member that are open at once: watches, the directives' stream, transfers.
    open_streams: int = Field(32, ge=1)
    # Downloads, uploads, fetches and deliveries of one member at once.
    transfers: int = Field(8, ge=1)
    # Updates of one site on their way in, and one model that an operator uploads.
    spool_mib: int = Field(16_384, ge=1)
    # Refused enrolments of one address (wrong tokens, bad requests). A good token is taken all the same.
    failed_enrolments_per_min: float = Field(10.0, gt=0)
    # Sites that wait for an operator's approval.
    enroll_requests: int = Field(256, ge=1)
    enroll_requests_per_address: int = Field(4, ge=1)
    enroll_requests_per_site: int = Field(4, ge=1)
    enroll_request_hours: float = Field(72.0, gt=0, le=24 * 30)

    @property
    def spool_bytes(self) -> int:
        """`spool_mib` in bytes."""
        return self.spool_mib << 20


class StorageConfig(ConfigSection):
    """How much the artifacts may take. Without a quota nothing is dropped that a plan does not give up itself."""

    # When models, updates and impressions together take more, models of old rounds are dropped.
    quota_gib: float | None = Field(None, gt=0)

    @property
    def quota_bytes(self) -> int | None:
        """`quota_gib` in bytes."""
        return None if self.quota_gib is None else int(self.quota_gib * (1 << 30))


Days = Annotated[float, Field(gt=0, le=365)]


class CertificatesConfig(ConfigSection):
    """How long certificates live, by role. They are renewed after two thirds of that."""

    site_days: Days = 30.0
    operator_days: Days = 30.0
    coordinator_days: Days = 30.0

    def lifetimes(self) -> dict[str, timedelta]:
        """Role -> lifetime."""
        return {
            "site": timedelta(days=self.site_days),
            "operator": timedelta(days=self.operator_days),
            "coordinator": timedelta(days=self.coordinator_days),
        }


class ServerConfig(ConfigSection):
    """fedserver.toml."""

    name: Name
    # The name that sites dial; it stands in the certificate.
    host: str = Field(min_length=1)
    port: Port = 8443
    enroll_port: Port = 8444
    # Interface to listen on; "[::]" is all of them, IPv4 included.
    listen: str = "[::]"
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    heartbeat_interval_s: float = Field(5.0, gt=0)
    compute: ComputeConfig = ComputeConfig()
    admission: AdmissionConfig = AdmissionConfig()
    limits: LimitsConfig = LimitsConfig()
    storage: StorageConfig = StorageConfig()
    certificates: CertificatesConfig = CertificatesConfig()
    metrics: MetricsConfig = MetricsConfig()


@dataclass(frozen=True, slots=True)
class ServerHome:
    """Paths below the coordinator's home folder."""

    root: Path

    @property
    def config(self) -> Path:
        """fedserver.toml."""
        return self.root / "fedserver.toml"

    @property
    def pki(self) -> Path:
        """Root and issuing CA: root.crt, root.key, issuing.crt, issuing.key."""
        return self.root / "pki"

    @property
    def ca_request(self) -> Path:
        """The key of an issuing CA that waits for its certificate (`fedserver ca request`)."""
        return self.root / "ca-request"

    @property
    def credential(self) -> Path:
        """The coordinator's own credential folder."""
        return self.root / "credential"

    @property
    def operator(self) -> Path:
        """The first operator's credential folder."""
        return self.root / "operator"

    @property
    def database(self) -> Path:
        """Journal, tokens, certificates, sites."""
        return self.root / "fedserver.db"

    @property
    def journal_end(self) -> Path:
        """The number of the journal's last record."""
        return self.root / "journal-end"

    @property
    def artifacts(self) -> Path:
        """Content-addressed models, updates and impressions."""
        return self.root / "artifacts"

    @property
    def spool(self) -> Path:
        """Updates that are still arriving."""
        return self.root / "spool"

    @property
    def lock(self) -> Path:
        """Held by the one coordinator that serves this home."""
        return self.root / "lock"
