"""fedsim: a federation in one process, for research. Data goes to stdout, progress and errors to stderr."""

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.program import run_program

if TYPE_CHECKING:
    from fedcore.plan import Plan
    from fedsim.experiments import Line
    from fedsim.runs import Result

EXIT_CODES = {"DONE": 0, "DEGRADED": 8}

app = typer.Typer(
    name="fedsim",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Simulate a federation in one process: the same rounds, strategies and training, without sockets.",
)


class Output(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"


DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="digits (the default), bloodmnist, wbc_multisite, or the path of an npz with MedMNIST's keys."
    ),
]
DataOption = Annotated[Path | None, typer.Option(help="File of the data set, where it is not embedded.")]
SitesOption = Annotated[int | None, typer.Option(min=1, max=10_000, help="Number of sites.")]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        min=0.001, max=10_000, help="Label skew (Dirichlet): small is skewed. Without it, sites are alike."
    ),
]
PartitionOption = Annotated[
    str | None,
    typer.Option(
        help="How images are dealt: dirichlet:ALPHA, iid, shards:PER_SITE, quantity:ALPHA, by_site, "
        "feature_shift:STRENGTH; a + adds a feature shift to another, e.g. shards:2+feature_shift:0.5."
    ),
]
PartitionFileOption = Annotated[
    Path | None,
    typer.Option(
        help="partition.json of a run: the same images at the same sites, for every seed.", dir_okay=False
    ),
]
MaxTrainOption = Annotated[
    int | None, typer.Option(min=1, help="Use only so many training images in all, drawn by class.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
ThreadsOption = Annotated[
    int, typer.Option(min=1, max=1024, help="torch threads of a run; part of its result.")
]
ForgettingOption = Annotated[
    int, typer.Option(min=0, help="Measure forgetting in so many rounds at the end; 0 saves the time.")
]
SeedsOption = Annotated[str, typer.Option(help="Seeds of split, model and training, separated by commas.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes at a time; all cores by default.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.", file_okay=False)]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table for people, json for programs.")]


@app.command()
def run(
    plan: Annotated[
        Path, typer.Argument(help="The plan, TOML as for `fedctl run submit`, or a saved plan.json.")
    ],
    out: OutOption,
    dataset: DatasetOption = None,
    data: DataOption = None,
    sites: SitesOption = None,
    alpha: AlphaOption = None,
    partition: PartitionOption = None,
    partition_file: PartitionFileOption = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="Seed of split, model and training; the plan's by default."),
    ] = None,
    max_train: MaxTrainOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    forgetting_rounds: ForgettingOption = 5,
    output: OutputOption = Output.TABLE,
) -> None:
    """Simulate one plan. Exits 0 if it is DONE, 8 if DEGRADED, 1 if FAILED."""
    chosen = _read_plan(plan)
    if seed is not None:
        chosen = chosen.model_copy(update={"seed": seed})
    from fedsim.data_choice import choose_data
    from fedsim.experiments import DataSpec

    choice = choose_data(
        dataset, data, sites=sites, alpha=alpha, partition=partition, partition_file=partition_file,
        max_train=max_train,
    )  # fmt: skip
    federation = DataSpec.of(choice, chosen.seed, max_train).load()
    from fedcore.round_record import RoundRecord
    from fedsim.runs import run as simulate

    def told(record: RoundRecord, model: Path) -> None:
        shown = "–" if record.balanced_accuracy is None else f"{record.balanced_accuracy:.3f}"
        _say(f"round {record.round}/{chosen.rounds}: balanced accuracy {shown}, {record.seconds:.1f} s")

    parts = ["fedsim", "run", str(plan), "--dataset", choice.dataset, *_given("--data", data)]
    parts += [*choice.split_arguments(), "--seed", str(chosen.seed), *_given("--max-train", max_train)]
    parts += ["--threads", str(threads), "--device", device, "--forgetting-rounds", str(forgetting_rounds)]
    result = simulate(
        chosen,
        federation,
        threads=threads,
        device=device,
        on_round=told,
        out=out,
        forgetting_rounds=forgetting_rounds,
        command=shlex.join([*parts, "--out", "DIR"]),
    )
    _show_result(result, output)
    raise typer.Exit(EXIT_CODES.get(result.state, 1))


@app.command()
def compare(
    strategies: Annotated[
        str,
        typer.Option(help="Strategies, separated by commas; pooled and single_site are the references."),
    ],
    out: OutOption,
    dataset: DatasetOption = None,
    data: DataOption = None,
    seeds: SeedsOption = "0,1,2",
    alpha: AlphaOption = None,
    partition: PartitionOption = None,
    partition_file: PartitionFileOption = None,
    profile: Annotated[
        str, typer.Option(help="small (3,000 images, 20 rounds) or full (all images, 40 rounds).")
    ] = ("small"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; the profile's by default.")] = None,
    sites: SitesOption = None,
    model: Annotated[str, typer.Option(help="Architecture.")] = "cnn",
    settings: Annotated[
        Path | None,
        typer.Option(
            help="TOML: a table of plan keys a strategy, in place of the stored tuned ones.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    forgetting_rounds: ForgettingOption = 5,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare strategies over seeds; finished runs are kept, so the same command goes on where it stopped."""
    from fedsim.comparison import Comparison
    from fedsim.comparison import compare as compare_strategies
    from fedsim.data_choice import choose_data
    from fedsim.protocol import load_settings

    choice = choose_data(
        dataset, data, sites=sites, alpha=alpha, partition=partition, partition_file=partition_file
    )
    asked = Comparison(
        dataset=choice.dataset,
        data=data,
        strategies=_names(strategies),
        seeds=_numbers(seeds),
        alpha=choice.alpha,
        partition=choice.partition,
        partition_file=choice.partition_file,
        out=out,
        profile=profile,
        sites=choice.sites,
        rounds=rounds,
        model=model,
        settings=load_settings(settings) if settings is not None else None,
        settings_path=settings,
        device=device,
        threads=threads,
        workers=workers or _cores(threads),
        forgetting_rounds=forgetting_rounds,
    )
    _show_lines(compare_strategies(asked, _say), out, output)


@app.command()
def sweep(
    plan: Annotated[Path, typer.Argument(help="The plan that is varied.")],
    out: OutOption,
    settings: Annotated[
        list[str],
        typer.Option("--set", help="KEY=V1,V2,...: values to try, e.g. training.learning_rate=0.01,0.02."),
    ],
    dataset: DatasetOption = None,
    data: DataOption = None,
    sites: SitesOption = None,
    alpha: AlphaOption = None,
    partition: PartitionOption = None,
    partition_file: PartitionFileOption = None,
    seeds: SeedsOption = "0",
    max_train: MaxTrainOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    forgetting_rounds: ForgettingOption = 0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Run a plan with every combination of some values. Choose by the validation accuracy in table.json."""
    from fedsim.comparison import Sweep
    from fedsim.comparison import sweep as sweep_plan
    from fedsim.data_choice import choose_data
    from fedsim.experiments import DataSpec
    from fedsim.protocol import parse_axis

    choice = choose_data(
        dataset, data, sites=sites, alpha=alpha, partition=partition, partition_file=partition_file,
        max_train=max_train,
    )  # fmt: skip
    asked = Sweep(
        plan=_read_plan(plan),
        plan_path=plan,
        axes=tuple(parse_axis(text) for text in settings),
        data=DataSpec.of(choice, 0, max_train),
        seeds=_numbers(seeds),
        out=out,
        device=device,
        threads=threads,
        workers=workers or _cores(threads),
        forgetting_rounds=forgetting_rounds,
    )
    _show_lines(sweep_plan(asked, _say), out, output)


@app.command()
def show(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run: DIR of `run`, or DIR/runs/CONFIG of `compare`.")
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a run was and how to repeat it."""
    from fedsim.showing import describe, read_run

    document = read_run(run)
    print(json.dumps(document, indent=2) if output is Output.JSON else describe(document))


@app.command()
def plot(folder: Annotated[Path, typer.Argument(help="Folder of `compare` or `sweep`.")]) -> None:
    """Write tables, pictures and report again, of all runs that a folder holds."""
    from fedsim.comparison import plot as plot_runs

    _show_lines(plot_runs(folder), folder, Output.TABLE)


def _read_plan(path: Path) -> "Plan":
    from fedcore.errors import PlanError
    from fedcore.plan import load_plan, plan_from_json

    if path.suffix == ".json":
        try:
            plan = plan_from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: can't be read: {error}") from error
    else:
        plan = load_plan(path)
    if plan.training.initial is not None:
        initial = str((path.parent / plan.training.initial).resolve())
        plan = plan.model_copy(update={"training": plan.training.model_copy(update={"initial": initial})})
    return plan


def _show_result(result: "Result", output: Output) -> None:
    from fedsim.summary import figures_of

    document: dict[str, Any] = {
        "state": result.state,
        "reason": result.reason,
        "rounds": len(result.records),
        "config": result.config_hash,
        "model": result.model_digest,
        **figures_of(result.records, result.best_round, result.forgetting),
        "seconds": round(result.seconds, 3),
        "hardware": result.hardware,
        "folder": str(result.folder),
    }
    if output is Output.JSON:
        print(json.dumps(document, indent=2))
        return
    for key, value in document.items():
        print(f"{key.replace('_', ' '):24} {_plain(value)}")


def _show_lines(lines: "list[Line]", out: Path, output: Output) -> None:
    from fedsim.statistics import settings_of
    from fedsim.tables import markdown

    if output is Output.JSON:
        print(json.dumps([line["row"] for line in lines], indent=2))
    else:
        print(markdown(settings_of(lines)))
    _say(
        f"written: {out}/table.json, table.csv, table.md, report.html, "
        "{curves,sites,classes,forgetting,impressions,features}-*.svg and .png"
    )


def _plain(value: object) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(text: str) -> tuple[str, ...]:
    from fedcore.errors import UsageError

    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError(f"--strategies {text!r}: names no strategy")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    from fedcore.errors import UsageError

    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise UsageError(f"--seeds {text!r}: expected whole numbers, separated by commas") from error
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r}: expected whole numbers from 0")
    return seeds


def _given(option: str, value: object) -> list[str]:
    return [] if value is None else [option, str(value)]


def _cores(threads: int) -> int:
    import os

    return max(1, len(os.sched_getaffinity(0)) // threads)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point. Exits with the code of operations.md; an error is one line with its code, and a hint."""
    run_program(app)


if __name__ == "__main__":
    main()
