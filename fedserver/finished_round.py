"""What the coordinator holds in memory of a round that is over.

It keeps every round of every run, for years. A record is some 11 kB of objects with three sites and more with each site;
what decisions and the housekeeping of artifacts ask for is a few words, and the rest is read when somebody looks at it.
"""

import zlib
from dataclasses import dataclass

from fedcore.round_record import RoundRecord


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """A round's number, its artifacts and the figure that the best round is picked by; `record` gives everything."""

    round: int
    model: str
    impressions_digest: str
    validation_accuracy: float | None
    packed: bytes

    @classmethod
    def of(cls, record_json: str) -> "FinishedRound":
        """From the round's line of rounds.jsonl. Raises pydantic.ValidationError if it is none."""
        record = RoundRecord.model_validate_json(record_json)
        return cls(
            record.round,
            record.model,
            record.impressions_digest,
            record.validation_accuracy,
            zlib.compress(record.model_dump_json().encode()),
        )

    def record(self) -> RoundRecord:
        """Everything that is known of it. Takes about 0.1 ms."""
        return RoundRecord.model_validate_json(self.record_json())

    def record_json(self) -> str:
        """The same as a line of rounds.jsonl."""
        return zlib.decompress(self.packed).decode()
