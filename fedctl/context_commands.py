"""fedctl context: which coordinator the other commands talk to."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedctl.completion import contexts as contexts_beginning
from fedctl.contexts import Contexts, load_contexts, save_contexts
from fedctl.invocation import Invocation
from fedctl.render import Column, Output, OutputOption, note, print_object, print_rows

app = typer.Typer(no_args_is_help=True, help="Know coordinators by name.")

NameArgument = Annotated[str, typer.Argument(help="Name of the context.")]
KnownArgument = Annotated[str, typer.Argument(help="Name of the context.", autocompletion=contexts_beginning)]


@app.command("add")
def add(
    ctx: typer.Context,
    name: NameArgument,
    credential: Annotated[
        Path, typer.Option("--credential", help="Credential folder, as HOME/operator of `fedserver init`.")
    ],
) -> None:
    """Add a context; the first one becomes the current one."""
    folder = _folder(ctx)
    contexts = load_contexts(folder).add(name, credential)
    save_contexts(folder, contexts)
    note(f"context '{name}' added" + (" and current" if contexts.current == name else ""))


@app.command("use")
def use(ctx: typer.Context, name: KnownArgument) -> None:
    """Make a context the current one."""
    folder = _folder(ctx)
    save_contexts(folder, load_contexts(folder).use(name))
    note(f"context '{name}' is current")


@app.command("list")
def list_contexts(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List the contexts."""
    contexts = load_contexts(_folder(ctx))
    rows = [_document(contexts, name) for name in contexts.folders]
    columns = [Column("CURRENT", "current"), Column("NAME", "name"), Column("CREDENTIAL", "credential")]
    print_rows(
        output, "contexts", rows, columns, empty="no contexts; fedctl context add NAME --credential DIR"
    )


@app.command("show")
def show(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of the context; the current one by default.", autocompletion=contexts_beginning
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a context, by default the current one, and where its coordinator is."""
    from fedcore.credential import load_credential

    contexts = load_contexts(_folder(ctx))
    chosen = name or contexts.current or ""
    credential = load_credential(contexts.folder(name), datetime.now(UTC), allow_expired=True)
    document = {
        **_document(contexts, chosen),
        "coordinator": credential.coordinator,
        "identity": credential.subject.spiffe_id,
    }
    lines = [
        ("name", document["name"]),
        ("current", document["current"]),
        ("coordinator", document["coordinator"]),
        ("identity", document["identity"]),
        ("credential", document["credential"]),
    ]
    print_object(output, document, lines)


@app.command("remove")
def remove(ctx: typer.Context, name: KnownArgument) -> None:
    """Forget a context; its credential folder stays where it is."""
    folder = _folder(ctx)
    contexts = load_contexts(folder).remove(name)
    save_contexts(folder, contexts)
    note(f"context '{name}' removed; current: {contexts.current or 'none'}")


def _folder(ctx: typer.Context) -> Path:
    invocation: Invocation = ctx.obj
    return invocation.config_dir


def _document(contexts: Contexts, name: str) -> dict[str, object]:
    return {"name": name, "current": name == contexts.current, "credential": str(contexts.folder(name))}
