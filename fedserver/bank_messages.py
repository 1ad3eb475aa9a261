"""Banks of impressions as messages: from a run's state, the file, and what sites said. Reads labels and ages, no pixel."""

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import StorageError
from fedcore.impression_check import ImpressionCheck
from fedcore.v1 import federation_pb2, impressions_pb2
from fedserver.bank_summary import BankSummary, summarise_bank
from fedserver.impression_purges import banks, in_use, kept, rfc3339_s
from fedserver.roster import Roster
from fedserver.round_state import Purge, RunState


def bank_message(
    state: RunState, number: int, store: ArtifactStore, roster: Roster
) -> impressions_pb2.ImpressionBank:
    """The bank that a round made: sizes, counts, holders and purge."""
    digest = banks(state)[number]
    purge = state.purge_of(number)
    summary = _summary(store, digest) if purge is None else None
    message = impressions_pb2.ImpressionBank(
        run=state.run,
        round=number,
        digest=digest,
        state="purged" if purge is not None else "stored" if summary is not None else "missing",
        in_use=purge is None and digest in in_use(state),
        holders=[_holder(site, digest, roster) for site in state.sites],
    )
    if summary is not None:
        message.num_images, message.bytes = summary.num_images, summary.size_bytes
        names = state.plan.class_names
        for label, count in summary.classes.items():
            name = names[label] if 0 <= label < len(names) else str(label)
            message.classes.add(name=name, num_images=count)
    if purge is not None:
        message.purge.CopyFrom(_purge_message(purge, digest))
    return message


def with_findings(
    message: impressions_pb2.ImpressionBank, state: RunState, store: ArtifactStore
) -> impressions_pb2.ImpressionBank:
    """The same message with ages, the gate's figures, what sites found, and where the images live on."""
    number = message.round
    message.class_names.extend(state.plan.class_names)
    if message.state == "stored" and (summary := _summary(store, message.digest)) is not None:
        for born, count in summary.born.items():
            message.born.add(round=max(0, born), num_images=count)
    for record in (finished.record() for finished in state.records):
        if record.round == number:
            message.figures.update(record.impressions.figures)
            message.note = record.impressions.note
        if _trained_on(state, record.round) == number:
            for site, check in record.impressions.checks.items():
                message.checks.add(site=site, round=record.round, check=_check_message(check))
    message.lives_on_in.extend(later_banks(state, number, store))
    return message


def later_banks(state: RunState, number: int, store: ArtifactStore) -> list[int]:
    """Later rounds whose bank, still stored, holds images that were begun in this round or before: each bank goes on
    from the one before.
    """
    return [
        later
        for later, digest in kept(state).items()
        if later > number
        and (summary := _summary(store, digest)) is not None
        and any(born <= number for born in summary.born)
    ]


def _trained_on(state: RunState, number: int) -> int | None:
    """The round whose bank sites had in a round: the newest made before it."""
    return max((made for made in banks(state) if made < number), default=None)


def _summary(store: ArtifactStore, digest: str) -> BankSummary | None:
    if digest not in store:
        return None
    try:
        return summarise_bank(store.path(digest))
    except StorageError:  # damaged, or purged since it was looked for
        return None


def _holder(site: str, digest: str, roster: Roster) -> impressions_pb2.ImpressionHolder:
    held = roster.impressions_of(site)
    copy = "unknown" if held is None else "holds" if digest in held else "none"
    return impressions_pb2.ImpressionHolder(site=site, copy=copy, connected=site in roster.sessions)


def _purge_message(purge: Purge, digest: str) -> impressions_pb2.PurgeState:
    message = impressions_pb2.PurgeState(
        purge=purge.id, at=rfc3339_s(purge.at), by=purge.by, reason=purge.reason
    )
    for site in purge.sites:
        said = purge.confirmed.get(site)
        one = message.sites.add(site=site)
        if said is not None:
            one.confirmed_at, one.audit_head = rfc3339_s(said.at), said.audit_head
            one.deleted = digest in said.deleted
    return message


def _check_message(check: ImpressionCheck) -> federation_pb2.ImpressionCheck:
    return federation_pb2.ImpressionCheck(**check.model_dump(exclude_none=True))
