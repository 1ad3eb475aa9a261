"""What each connected site is told to do: makes the sessions' assignments equal to what a run asks of them."""

from collections.abc import Callable, Collection, Mapping

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import Clock
from fedcore.tensor_file import read_manifest
from fedcore.v1 import federation_pb2
from fedserver.directives import evaluate_directive, recalibrate_directive, stop_directive, train_directive
from fedserver.recalibration import Recalibrate
from fedserver.roster import Assignment, Roster, Session
from fedserver.round_state import RunState
from fedserver.round_work import Evaluate, Train

StateOf = Callable[[str], RunState | None]


class Assigning:
    """Tells sites what to do, and to stop what is no longer wanted. `state_of` gives the state of a run by its id."""

    def __init__(self, roster: Roster, store: ArtifactStore, clock: Clock, state_of: StateOf) -> None:
        self._roster = roster
        self._store = store
        self._clock = clock
        self._state_of = state_of

    def assign(
        self, sites: Collection[str], state: RunState | None, wanted: Mapping[str, Assignment]
    ) -> None:
        """Give those of `sites` that are connected what the active run wants of them; without a state there is none.

        Raises FedimpresError if what they should fetch is missing or damaged on this disk.
        """
        directives: dict[tuple[object, ...], federation_pb2.Directive] = {}
        for site in sites:
            session = self._roster.sessions.get(site)
            if session is not None:
                self._assign(session, state, wanted.get(site), directives)

    def tell_parked(self, state: RunState) -> None:
        """Say to the sites that a round leaves out why it does."""
        for site in state.parked.keys() & self._roster.sessions.keys():
            self._roster.sessions[site].send(stop_directive(state.run, state.parked[site].reason))

    def _assign(
        self,
        session: Session,
        state: RunState | None,
        command: Assignment | None,
        directives: dict[tuple[object, ...], federation_pb2.Directive],
    ) -> None:
        """Give a session its assignment, or take back one that is no longer wanted."""
        if command is None and not session.settled:
            session.send(stop_directive("", "the coordinator waits for no work of this site"))
        session.settled = True
        if session.assignment == command and (
            command is None or (state is not None and session.run == state.run)
        ):
            return
        if command is None or state is None:
            if session.run is not None and self._withdrawn(session):
                session.send(stop_directive(session.run, "the coordinator no longer waits for this work"))
            session.assignment = None
            return
        # Of a round's directives all but the name of the site is the same, and they are many.
        kind = _all_but_site(command)
        directive = directives.get(kind)
        if directive is None:
            directive = directives[kind] = self._directive(state, command)
        if session.send(directive):
            session.run, session.assignment = state.run, command
            session.last_progress = self._clock.monotonic()

    def _directive(self, state: RunState, command: Assignment) -> federation_pb2.Directive:
        model_bytes = self._payload_bytes(command.model)
        if isinstance(command, Recalibrate):
            return recalibrate_directive(state, command, model_bytes)
        if isinstance(command, Evaluate):
            return evaluate_directive(state, command, model_bytes)
        impressions_bytes = self._payload_bytes(command.impressions) if command.impressions else 0
        state_bytes = self._payload_bytes(command.strategy_state) if command.strategy_state else 0
        return train_directive(state, command, model_bytes, impressions_bytes, state_bytes)

    def _withdrawn(self, session: Session) -> bool:
        """Whether the session's work was taken back, rather than done."""
        state = self._state_of(session.run or "")
        current = state.current if state is not None else None
        if session.assignment is None:
            return False
        if current is None or current.number != session.assignment.round:
            return state is None or state.finished < session.assignment.round
        if isinstance(session.assignment, Train):
            return session.site not in current.reported
        if isinstance(session.assignment, Recalibrate):
            return session.site not in current.statistics
        return session.site not in current.evaluations

    def _payload_bytes(self, digest: str) -> int:
        return read_manifest(self._store.find(digest))[0].payload_bytes


def _all_but_site(command: Assignment) -> tuple[object, ...]:
    if isinstance(command, Train):
        return command.round, command.attempt, command.model, command.impressions, command.strategy_state
    return type(command), command.round, command.model
