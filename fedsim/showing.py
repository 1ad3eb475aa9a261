"""What a saved run was, and how to repeat it. No torch."""

import json
from pathlib import Path
from typing import Any

from fedcore.errors import NotFoundError, StorageError

RUN_FILE = "run.json"


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder, with the run's plan, split and last round. Raises NotFoundError, StorageError."""
    if not (folder / RUN_FILE).is_file():
        runs = sorted(path.parent.name for path in folder.glob(f"runs/*/{RUN_FILE}"))
        hint = (
            f"one of its runs: {folder}/runs/{runs[0]} ({len(runs)} in all)"
            if runs
            else "see: fedsim run --help"
        )
        raise NotFoundError(f"{folder}: holds no run ({RUN_FILE} is missing)", hint=hint)
    try:
        document: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        document["plan"] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        document["split"] = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
        rounds = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        document["last_round"] = json.loads(rounds[-1]) if rounds else None
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: the run can't be read: {error}") from error
    return {"folder": str(folder), **document}


def describe(document: dict[str, Any]) -> str:
    """The run in words: figures, what made it, and the way to get the same numbers again."""
    split, plan, last = document["split"], document["plan"], document["last_round"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    skew = "" if split["alpha"] is None else f", alpha {split['alpha']:g}"
    lines = [
        f"{plan['strategy']} on {split['dataset']}: {document['state']}, {document['rounds']} rounds",
        f"split       {len(split['sites'])} sites, {split['method']}{skew}, seed {split['seed']}"
        f" ({split['description']})",
        f"seed        {plan['seed']}",
        f"hardware    {document['hardware']}",
        f"versions    {versions}",
        f"config      {document['config']}",
        f"model       sha256 {document['model_digest']}",
    ]
    if last is not None and last["balanced_accuracy"] is not None:
        lines.append(
            f"last round  accuracy {last['accuracy']:.4f}, balanced accuracy {last['balanced_accuracy']:.4f}"
        )
    return "\n".join(
        [*lines, "", "Repeat it; the model must have the same sha256:", "", how_to_repeat(document)]
    )


def how_to_repeat(document: dict[str, Any]) -> str:
    """A command, or Python where the run was started from Python."""
    if document["command"]:
        return f"  {document['command']}"
    folder = document["folder"]
    return "\n".join(
        [
            "  import json, pathlib, fedsim",
            "  from fedcore.data.benchmark_sets import load_recorded",
            "  from fedcore.plan import plan_from_json",
            f"  folder = pathlib.Path({folder!r})",
            "  # load_recorded(record, DATA) where the data set has a file",
            "  federation = load_recorded(json.loads((folder / 'partition.json').read_text()))",
            "  fedsim.run(plan_from_json((folder / 'plan.json').read_text()), federation)",
        ]
    )
