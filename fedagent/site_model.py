"""The model that a site scored last, as the site itself may use it: the global one, or with the site's own tensors in it.

The coordinator hands out the global model. Where a strategy leaves tensors at the sites, or gives each site a version of
its own, only the site can put its model together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fedagent.transfer import save_record
from fedcore.errors import NotFoundError, StorageError
from fedcore.model_card import described
from fedcore.plan import Plan, plan_from_json

_NAME = "model.json"


class ScoredModel(BaseModel):
    """A global model that this site scored in a round, and what it found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    run: str
    round: int
    digest: str
    plan_json: str
    # Tensors of which the site has its own: those that never leave it, and those that are sent as well.
    own_tensors: tuple[str, ...]
    # As in `SplitMetrics` of the wire.
    splits: tuple[dict[str, Any], ...]

    @property
    def plan(self) -> Plan:
        """The run's plan, as sites get it."""
        return plan_from_json(self.plan_json)


def remember(folder: Path, scored: ScoredModel) -> None:
    """Keep it in the run's folder, in place of the round before. Raises OSError."""
    save_record(folder / _NAME, scored.model_dump(mode="json"))


def last_scored(local_state: Path, run: str | None = None) -> tuple[ScoredModel, Path]:
    """What was scored last, of a run or of whichever is here, and the run's folder.

    Raises NotFoundError if nothing was, StorageError if the record is damaged.
    """
    paths = [path for path in local_state.glob(f"*/{_NAME}") if run in (None, path.parent.name)]
    if not paths:
        raise NotFoundError(
            f"this site has scored no model{f' of run {run}' if run is not None else ''} that is still here",
            hint="a site keeps the model of its newest run, from the end of the run's first round on",
        )
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    try:
        return ScoredModel.model_validate_json(newest.read_bytes()), newest.parent
    except ValueError as error:
        hint = "it is written anew when this site scores a model again"
        raise StorageError(f"{newest}: is no record of a scored model", hint=hint) from error


def write_site_model(scored: ScoredModel, state: Path, artifacts: Path, out: Path) -> str:
    """Write the model to `out` and return its digest. `state` is the run's folder, `artifacts` the site's store.

    Raises NotFoundError if the global model or the site's tensors are not here any more, StorageError if one is damaged.
    """
    from fedagent.local_state import LocalState
    from fedagent.trainer import with_own
    from fedcore.artifact_store import artifact_path
    from fedcore.digest import is_intact
    from fedcore.models.state_file import load_tensors, save_state

    path = artifact_path(artifacts, scored.digest)
    # What the site had when it scored: a round that it trained since is not in it.
    own = LocalState(state).before(scored.round + 1) if scored.own_tensors else None
    if not is_intact(path, scored.digest) or (scored.own_tensors and own is None):
        raise NotFoundError(
            f"run {scored.run} round {scored.round}: the model is not whole here",
            hint="between two rounds a site may hold only the next one's: try again after the round, or fetch the global "
            "model from the operator",
        )
    return save_state(out, with_own(load_tensors(path), scored.own_tensors, own))


def card(scored: ScoredModel, digest: str) -> dict[str, object]:
    """What one needs to use the file: as the coordinator's model card, with this site's figures."""
    plan = scored.plan
    return {
        "run": scored.run,
        "round": scored.round,
        "digest": digest,
        "global_model": scored.digest,
        "site": scored.site,
        **described(plan),
        "metrics": _accuracies(scored.splits),
        "seed": plan.seed,
        "own_tensors": list(scored.own_tensors),
    }


def _accuracies(splits: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{split['split']}_accuracy": split["num_correct"] / split["num_examples"]
        for split in splits
        if split["num_examples"]
    }
