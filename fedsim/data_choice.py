"""What `--dataset --data --sites --alpha --partition --partition-file` ask for together. No torch."""

from dataclasses import dataclass
from pathlib import Path

from fedcore.data.benchmark_sources import REAL_SITES
from fedcore.data.partition_scheme import BY_SITE, DIRICHLET, IID, choose_scheme, number_text
from fedcore.data.saved_partition import read_record
from fedcore.errors import ConfigError

DEFAULT_DATASET = "digits"


@dataclass(frozen=True, slots=True)
class DataChoice:
    """A data set and a way to deal it, free of contradictions.

    `partition` is a scheme's text, None where `alpha` and the data set say it all: what means the same is the same.
    With `partition_file` the split is that file's and nothing else is set.
    """

    dataset: str
    data: Path | None
    sites: int | None = None
    alpha: float | None = None
    partition: str | None = None
    partition_file: Path | None = None

    @property
    def real_sites(self) -> bool:
        """Whether the sites are the data set's own, so that their number and size are not for us to choose."""
        return self.dataset == REAL_SITES or (self.partition or "").partition("+")[0] == BY_SITE

    def split_arguments(self) -> list[str]:
        """The options that say how images are dealt, for a command line."""
        parts = [] if self.alpha is None else ["--alpha", number_text(self.alpha)]
        parts += [] if self.partition is None else ["--partition", self.partition]
        parts += [] if self.partition_file is None else ["--partition-file", str(self.partition_file)]
        return parts + ([] if self.sites is None else ["--sites", str(self.sites)])


def choose_data(
    dataset: str | None,
    data: Path | None,
    *,
    sites: int | None,
    alpha: float | None,
    partition: str | None,
    partition_file: Path | None,
    max_train: int | None = None,
) -> DataChoice:
    """The choice that these options make; None where one was not given.

    Raises ConfigError if two contradict one another, DataError if the partition file can't be read.
    """
    if partition_file is not None:
        given = {"--partition": partition, "--alpha": alpha, "--sites": sites, "--max-train": max_train}
        named = [option for option, value in given.items() if value is not None]
        if named:
            raise ConfigError(
                f"--partition-file {partition_file} says which image is where, {named[0]} contradicts it",
                hint=f"leave {' and '.join(named)} out",
            )
        recorded = str(read_record(partition_file)["dataset"])
        return DataChoice(dataset or recorded, data, partition_file=partition_file)
    name = dataset or DEFAULT_DATASET
    scheme = choose_scheme(partition, alpha, dataset=name, real_sites=name == REAL_SITES)
    usual = not scheme.shift and (
        scheme.method in (IID, DIRICHLET) or (scheme.method == BY_SITE and name == REAL_SITES)
    )
    if usual:
        return DataChoice(name, data, sites, scheme.alpha)
    return DataChoice(name, data, sites, partition=scheme.text)
