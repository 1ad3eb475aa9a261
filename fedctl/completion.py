"""Completion on the command line: the shell's script, and names of runs, sites and contexts as candidates.

A shell waits for candidates while somebody types: whatever goes wrong gives none, at the latest after a second, and says
nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fedctl.contexts import config_dir, load_contexts

if TYPE_CHECKING:
    from fedctl.admin import Admin

_LIMIT_S = 1.0
# The newest runs are what is asked for; a list of thousands helps nobody.
_MAX_CANDIDATES = 50


class Shell(StrEnum):
    """Shells that a script is there for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    ctx: typer.Context, shell: Annotated[Shell, typer.Argument(help="The shell to print the script for.")]
) -> None:
    """Print a shell's completion script: commands, options, and names of runs, sites and contexts.

    bash: fedctl completion bash > ~/.local/share/bash-completion/completions/fedctl

    zsh: fedctl completion zsh > a folder of $fpath, as _fedctl

    fish: fedctl completion fish > ~/.config/fish/completions/fedctl.fish
    """
    from typer.completion import shell_complete

    root = ctx.find_root().command
    raise typer.Exit(shell_complete(root, {}, "fedctl", "_FEDCTL_COMPLETE", f"source_{shell.value}"))


def contexts(incomplete: str) -> list[str]:
    """Names of contexts that begin so."""
    with contextlib.suppress(Exception):
        return _beginning(incomplete, load_contexts(config_dir(os.environ)).folders)
    return []


def sites(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of enrolled sites that begin so."""

    def ask(admin: "Admin") -> Iterable[str]:
        from fedcore.v1 import admin_pb2

        return (
            site.id for site in admin.stub.ListSites(admin_pb2.ListSitesRequest(), timeout=_LIMIT_S).sites
        )

    return _from_coordinator(ctx, incomplete, ask)


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of runs that begin so, the newest first."""

    def ask(admin: "Admin") -> Iterable[str]:
        from fedcore.v1 import admin_pb2

        return (run.run for run in admin.stub.ListRuns(admin_pb2.ListRunsRequest(), timeout=_LIMIT_S).runs)

    return _from_coordinator(ctx, incomplete, ask)


RunArgument = Annotated[
    str, typer.Argument(help="Id of the run, or a unique beginning of one.", autocompletion=runs)
]
SiteArgument = Annotated[str, typer.Argument(help="Name of the site.", autocompletion=sites)]


def _from_coordinator(
    ctx: typer.Context, incomplete: str, ask: Callable[["Admin"], Iterable[str]]
) -> list[str]:
    # gRPC's own words about a connection would land in the middle of what is being typed.
    os.environ["GRPC_VERBOSITY"] = "NONE"
    with contextlib.suppress(Exception):
        from fedctl.admin import open_credential

        # The options are parsed, but no callback has run: there is no Invocation yet.
        chosen = ctx.find_root().params.get("context") or os.environ.get("FEDIMPRES_CONTEXT")
        folder = load_contexts(config_dir(os.environ)).folder(chosen)
        with open_credential(folder) as admin:
            return _beginning(incomplete, ask(admin))
    return []


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)][:_MAX_CANDIDATES]
