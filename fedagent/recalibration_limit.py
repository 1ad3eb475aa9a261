"""What a coordinator may have this site measure: BatchNorm statistics of one model, in the round of its last update.

Statistics tell exactly what a model sees of the images here, so whoever could name any model at any time would learn more
than updates tell. A note in the run's folder says of which round the last update was and which model was answered for. It
is durable before an update or statistics leave, and so is the answer: asked for again, also after a restart, the same bytes
are sent.
"""

import hashlib
import threading
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedcore.errors import PermissionDeniedError
from fedcore.private_files import write_file
from fedcore.v1 import federation_pb2

_NOTE, _ANSWER = "last_update.json", "statistics.message"
_HINT = (
    "if it comes again, ask the coordinator's operator why; fedagent audit list --action statistics.refuse"
)


class LastUpdate(BaseModel):
    """The update that left here last: its round, what its training started from (digests), and what was answered for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    inputs: str
    # The model that was measured, and the SHA-256 of the message with its statistics; "" until one was.
    model: str = ""
    answer: str = ""


class RecalibrationLimit:
    """The notes and answers in the runs' folders below `local_state`. May be used from several threads."""

    def __init__(self, local_state: Path) -> None:
        self._local_state = local_state
        # A task that was withdrawn may still write its answer while the next one goes on.
        self._turn = threading.Lock()

    def update_leaves(self, run: str, round_number: int, inputs: str) -> None:
        """Note that an update is about to be sent. The same one again changes nothing. Raises OSError."""
        with self._turn:
            known = self._note(run)
            if known is None or (known.round, known.inputs) != (round_number, inputs):
                self._keep(run, LastUpdate(round=round_number, inputs=inputs))

    def answer(self, run: str, round_number: int, model: str) -> federation_pb2.StatisticsReport | None:
        """The statistics of this model that were given before; None if they are to be measured.

        Raises PermissionDeniedError if this site's last update is of another round or none, or statistics of another model
        were given for it.
        """
        with self._turn:
            note = self._checked(run, round_number, model)
            return self._given(run, note) if note.model else None

    def answered(self, report: federation_pb2.StatisticsReport) -> None:
        """Keep statistics that are about to be sent. Raises OSError, PermissionDeniedError as `answer` does."""
        body = report.SerializeToString(deterministic=True)
        with self._turn:
            note = self._checked(report.run, report.round, report.model)
            write_file(self._local_state / report.run / _ANSWER, body)
            told = {"model": report.model, "answer": hashlib.sha256(body).hexdigest()}
            self._keep(report.run, note.model_copy(update=told))

    def _checked(self, run: str, round_number: int, model: str) -> LastUpdate:
        note = self._note(run)
        if note is None or note.round != round_number:
            last = "none was sent" if note is None else f"the last one sent is of round {note.round}"
            raise PermissionDeniedError(
                f"refuses: run {run} round {round_number}: statistics are measured in the round of this site's last update "
                f"only, {last}",
                hint=_HINT,
            )
        if note.model not in ("", model):
            raise PermissionDeniedError(
                f"refuses: run {run} round {round_number}: statistics of model {note.model[:12]} were given, and one model "
                f"is measured a round; asked for {model[:12]!r}",
                hint=_HINT,
            )
        return note

    def _given(self, run: str, note: LastUpdate) -> federation_pb2.StatisticsReport | None:
        """The answer on the disk; None if it is damaged: it is measured anew, of the same model."""
        try:
            body = (self._local_state / run / _ANSWER).read_bytes()
            if hashlib.sha256(body).hexdigest() == note.answer:
                return federation_pb2.StatisticsReport.FromString(body)
        except OSError:
            pass
        return None

    def _note(self, run: str) -> LastUpdate | None:
        try:
            return LastUpdate.model_validate_json((self._local_state / run / _NOTE).read_bytes())
        except (OSError, ValueError):
            return None

    def _keep(self, run: str, note: LastUpdate) -> None:
        folder = self._local_state / run
        folder.mkdir(exist_ok=True)
        write_file(folder / _NOTE, note.model_dump_json().encode())
