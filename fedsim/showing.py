"""What a saved run was, and how to repeat it. No torch."""

import json
from pathlib import Path
from typing import Any

from fedcore.data.saved_partition import split_name
from fedcore.errors import NotFoundError, StorageError

RUN_FILE = "run.json"
PARTITION_FILE = "partition.json"
SHOWN_SITES = 12


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder, with the run's plan, split (less its indices) and last round.

    Raises NotFoundError, StorageError.
    """
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
        document["split"] = json.loads((folder / PARTITION_FILE).read_text(encoding="utf-8"))
        for site in document["split"]["sites"].values():
            # Thousands of numbers: they stay in the file.
            site.pop("indices", None)
        rounds = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        document["last_round"] = json.loads(rounds[-1]) if rounds else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StorageError(f"{folder}: the run can't be read: {error}") from error
    return {"folder": str(folder), **document}


def describe(document: dict[str, Any]) -> str:
    """The run in words: figures, what made it, and the way to get the same numbers again."""
    split, plan, last = document["split"], document["plan"], document["last_round"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    skew = "" if split["alpha"] is None else f", alpha {split['alpha']:g}"
    # Runs of older versions know their method and alpha only.
    dealt = split.get("partition") or f"{split['method']}{skew}"
    lines = [
        f"{plan['strategy']} on {split['dataset']}: {document['state']}, {document['rounds']} rounds",
        f"split       {len(split['sites'])} sites, {dealt}, seed {split['seed']} ({split['description']})",
        *_sites(split["sites"]),
        f"partition   {Path(document['folder']) / PARTITION_FILE} "
        f"(split {split_name(split)}; the same sites again: --partition-file)",
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


def _sites(sites: dict[str, Any]) -> list[str]:
    """A line a site, at most SHOWN_SITES: sizes of its splits, digest, feature shift."""
    lines = []
    for name, site in list(sites.items())[:SHOWN_SITES]:
        sizes = f"{site['train']} + {site['validation']} + {site['test']} images"
        lines.append(f"  {name:<10}{sizes}, sha256 {site['sha256'][:12]}{_shift_words(site.get('shift'))}")
    more = len(sites) - SHOWN_SITES
    return [*lines, f"  and {more} more"] if more > 0 else lines


def _shift_words(shift: dict[str, Any] | None) -> str:
    if shift is None:
        return ""
    stain = "/".join(f"{scale:.2f}" for scale in shift["stain"])
    return (
        f"; stain x{stain}, brightness {shift['brightness']:+.0f}, blur {shift['blur_px']:.2f} px, "
        f"noise {shift['noise']:.0f}"
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
