"""Guards of the product, broken one at a time: a suite that does not see it proves nothing.

`break_guard(NAME)` is called by `preload/sitecustomize.py` in every program of a federation: the modules that hold the guard
are changed as soon as they are imported. Nothing in the product knows of this.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Patch = Callable[[Any], None]


# -- what each breaks; `module` is the product's, just imported --------------------------------


def _sync_nothing(module: Any) -> None:
    module.sync_data = module.sync_file = lambda descriptor: None


def _commit_unsynced(module: Any) -> None:
    connect = module._connect

    def unsynced(path: Any) -> Any:
        connection = connect(path)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    module._connect = unsynced


def _finish_unchecked(module: Any) -> None:
    def finish(sink: Any) -> None:
        if not sink.complete:
            raise module.TruncatedStreamError("stream ended early")

    module.TensorSink.finish = finish


def _take_any_update(module: Any) -> None:
    """Of the round under way, as often as it comes; of rounds that are over too."""
    module.RunState.awaits_update = lambda state, site, round_number: not state.status.final


def _take_updates_twice(module: Any) -> None:
    def awaits(state: Any, site: str, round_number: int) -> bool:
        current = state.current
        return state.stage == "training" and current is not None and current.number == round_number

    module.RunState.awaits_update = awaits


def _know_no_delivery(module: Any) -> None:
    module.Deliveries._stored = lambda deliveries, site, key: False


def _accept_late_updates(module: Any) -> None:
    apply = module._apply_to_round

    def late(state: Any, event: Any) -> Any:
        over = state.current is None or state.current.number != getattr(event, "round", None)
        return state if over and event.kind == "update_stored" else apply(state, event)

    module._apply_to_round = late


def _miss_no_records(module: Any) -> None:
    module.JournalEnd.lost = lambda end, database: 0


def _confirm_early(module: Any) -> None:
    """What happened is told at once, and written a moment later."""
    import asyncio

    append = module.Journal.append

    async def early(journal: Any, events: Any) -> None:
        async def write() -> None:
            await asyncio.sleep(6)
            await append(journal, events)

        journal.late = [*getattr(journal, "late", []), asyncio.create_task(write())]

    module.Journal.append = early


def _sum_as_they_came(module: Any) -> None:
    """In the order of arrival, as a single-precision sum would be affected by it."""
    import dataclasses

    merge = module.merge_updates

    def merge_updates(request: Any, *args: Any, **options: Any) -> Any:
        by_arrival = sorted(request.updates, key=lambda update: update.path.stat().st_mtime_ns)
        merged = merge(dataclasses.replace(request, updates=by_arrival), *args, **options)
        return dataclasses.replace(merged, accepted=tuple(sorted(merged.accepted)))

    module.merge_updates = merge_updates


def _sum_in_single_precision(module: Any) -> None:
    import torch

    begin = module.SumMerger.__init__

    def init(merger: Any, summands: Any) -> None:
        begin(merger, summands)
        merger._total, merger._scratch = merger._total.float(), merger._scratch.to(torch.float32)

    module.SumMerger.__init__ = init


def _ask_once(module: Any) -> None:
    """A site that has said that it began is not asked again, whoever was restarted meanwhile."""
    assign = module.Assigning._assign

    def once(assigning: Any, session: Any, state: Any, command: Any, directives: Any) -> None:
        current = state.current if state is not None else None
        begun = current is not None and session.site in current.started
        if isinstance(command, module.Train) and begun and session.assignment is None:
            return
        assign(assigning, session, state, command, directives)

    module.Assigning._assign = once


def _keep_parts_as_whole(module: Any) -> None:
    from fedcore.v1 import federation_pb2

    offset = module.Deliveries.offset

    def whole(deliveries: Any, site: str, key: Any) -> Any:
        path = deliveries._path(site, key)
        if path.exists() and path.stat().st_size:
            return federation_pb2.DeliveryOffsetReply(stored=True)
        return offset(deliveries, site, key)

    module.Deliveries.offset = whole


def _hash_nothing_again(module: Any) -> None:
    if "fedserver.compute" in sys.orig_argv:
        module.is_intact = lambda path, digest: True


def _hash_no_statistics(module: Any) -> None:
    module.load_intact = lambda path, digest: module.load_tensors(path)


def _note_unsynced(module: Any) -> None:
    module.write_file = lambda path, data: path.write_bytes(data)


def _trust_the_cache(module: Any) -> None:
    module.ArtifactStore.intact = lambda store, digest: digest in store


def _blame_the_site(module: Any) -> None:
    """The coordinator's full disk ends the site's task."""

    class Never(Exception):
        pass

    module.StorageError = Never


def _try_once(module: Any) -> None:
    module._TRAIN_ATTEMPTS = 1


def _read_the_wall_clock(module: Any) -> None:
    module.SystemClock.monotonic = module.SystemClock.wall


def _leave_the_spool(module: Any) -> None:
    module.Deliveries._sweep = lambda deliveries: None


# -- the guards --------------------------------------------------------------------------------

MUTANTS: Mapping[str, Mapping[str, Patch]] = {
    "no fsync": {"fedcore.durability": _sync_nothing, "fedcore.database": _commit_unsynced},
    "no digest check at receipt": {"fedcore.tensor_stream": _finish_unchecked},
    "stored updates are not hashed again": {"fedcore.digest": _hash_nothing_again},
    "an update counts as often as it comes": {
        "fedserver.round_state": _take_updates_twice,
        "fedserver.deliveries": _know_no_delivery,
    },
    "no look at the round of a late update": {
        "fedserver.round_state": _take_any_update,
        "fedserver.round_machine": _accept_late_updates,
    },
    "a lost tail of the journal goes unnoticed": {"fedserver.journal_end": _miss_no_records},
    "confirmed before it is in the journal": {"fedserver.journal": _confirm_early},
    "summed by order of arrival": {
        "fedserver.aggregation": _sum_as_they_came,
        "fedserver.block_mergers": _sum_in_single_precision,
    },
    "sites are not asked again": {"fedserver.assigning": _ask_once},
    "a part of an upload counts as the whole": {"fedserver.deliveries": _keep_parts_as_whole},
    "an agent trusts what it has cached": {"fedcore.artifact_store": _trust_the_cache},
    "a full disk at the coordinator fails the site": {
        "fedagent.transfer": _blame_the_site,
        "fedagent.tasks": _try_once,
    },
    "deadlines by the wall clock": {"fedcore.clock": _read_the_wall_clock},
    "stored statistics are not hashed again": {"fedcore.models.state_file": _hash_no_statistics},
    "a site's last update is not noted for good": {"fedagent.recalibration_limit": _note_unsynced},
    "the spool is never swept": {"fedserver.deliveries": _leave_the_spool},
}


class _Breaker(importlib.abc.MetaPathFinder):
    """Finds modules as ever, and has some changed after they were executed."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self._patches.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def break_guard(name: str) -> None:
    """Break a guard in this process. Before any module of the product is imported."""
    sys.meta_path.insert(0, _Breaker(MUTANTS[name]))
