"""fedctl context: which coordinator the other commands talk to."""

import sys
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


@app.command("enroll")
def enroll(
    ctx: typer.Context,
    name: NameArgument,
    coordinator: Annotated[str, typer.Option("--coordinator", help="HOST:PORT of the coordinator.")],
    token: Annotated[
        str,
        typer.Option("--token", help="An operator's token; '-' reads it from stdin.", envvar="FEDCTL_TOKEN"),
    ],
    ca_fingerprint: Annotated[
        str, typer.Option("--ca-fingerprint", help="SHA-256 of the federation's root certificate.")
    ],
    credential: Annotated[
        Path | None,
        typer.Option("--credential", help="Where to put the credential; below fedctl's settings by default."),
    ] = None,
    proxy: Annotated[
        str | None, typer.Option("--proxy", help="HTTP CONNECT proxy, http://HOST:PORT.")
    ] = None,
) -> None:
    """Exchange a single-use token for this operator's credential, and add a context for it.

    The key is made here and never leaves this machine. An owner makes the token: fedctl enroll token create --operator.
    """
    from fedctl.operator_enrolment import enroll_operator

    folder = _folder(ctx)
    contexts = load_contexts(folder)
    contexts.refuse_name(name)  # before the token is used up
    target = credential or folder / "credentials" / name
    enrolled = enroll_operator(
        target,
        coordinator=coordinator,
        token=sys.stdin.read() if token == "-" else token,  # noqa: S105 - a file name's dash
        ca_fingerprint=ca_fingerprint,
        now=datetime.now(UTC),
        proxy=proxy,
    )
    contexts = contexts.add(name, target)
    save_contexts(folder, contexts)
    note(
        f"operator {enrolled.id} of federation {enrolled.federation}: credential in {target}; context '{name}' added"
        + (" and current" if contexts.current == name else "")
        + "\nnext: fedctl auth whoami; renew it within its life: fedctl cert renew"
    )


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
    columns = [
        Column("CURRENT", "current"),
        Column("NAME", "name"),
        Column("CREDENTIAL", "credential", wraps=True),
    ]
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
