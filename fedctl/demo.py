"""fedctl demo: a whole federation on this machine, from data to report, with one command."""

from pathlib import Path
from typing import Annotated

import typer

from fedctl.render import Output, OutputOption, note, percent, print_json, print_object

EXIT_CODES = {"DONE": 0, "DEGRADED": 8}


def demo(
    dataset: Annotated[
        str,
        typer.Option(help="digits, bloodmnist, wbc_multisite, or the path of an npz with MedMNIST's keys."),
    ] = "digits",
    data: Annotated[Path | None, typer.Option(help="File of the data set, where it is not embedded.")] = None,
    sites: Annotated[
        int | None, typer.Option(min=1, max=64, help="Number of sites; 4, or the data set's own, by default.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Number of rounds; what suits the data set by default."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="fedavg, fedavg_uniform, fedbn, fedimpres, fedimpres_paper, fedlc, fedntd, fedopt, fedprox, "
            "moon, scaffold, vhl, or an installed plug-in."
        ),
    ] = "fedimpres",
    alpha: Annotated[
        float, typer.Option(min=0.001, max=10_000, help="Skew of the labels: small is skewed, large is even.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the split, the model and the training.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fedimpres-demo"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Run a real coordinator and real agents on this machine, train, and write a report.

    Nothing is left running, whatever ends it.
    """
    from fedctl.demo_run import DemoOptions, run_demo

    result = run_demo(DemoOptions(dataset, data, sites, rounds, strategy, alpha, seed, out))
    document = result.document
    if output is Output.TABLE:
        final = document["final"]
        lines = [
            ("run", f"{document['run']} {result.state}"),
            ("rounds", document["rounds"]),
            ("accuracy", percent(final["accuracy"])),
            ("balanced accuracy", percent(final["balanced_accuracy"])),
            ("worst site", percent(final["worst_site_accuracy"])),
            ("report", document["report"]),
        ]
        print_object(output, document, lines)
    else:
        print_json(document, compact=output is Output.JSONL)
    if result.state != "DONE":
        note(f"the run ended {result.state}: {result.reason or 'see the report'}")
    raise typer.Exit(EXIT_CODES.get(result.state, 1))
