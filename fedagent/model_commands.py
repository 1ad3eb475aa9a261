"""fedagent model: the model that this site may use."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedagent.impression_commands import person
from fedagent.site_commands import HomeOption, home_of

model_app = typer.Typer(no_args_is_help=True, help="The model of this site's newest run.")


@model_app.command("export")
def export(
    home: HomeOption,
    out: Annotated[
        Path, typer.Option("--out", help="File to write (.safetensors); its card beside it (.json).")
    ],
    run: Annotated[str | None, typer.Option("--run", help="Only if it is of this run.")] = None,
) -> None:
    """Write the model that this site scored last, its own tensors in it where the strategy gives it some.

    Also while the agent runs. Recorded in the site's audit log.
    """
    from fedagent.audit import open_site_audit
    from fedagent.site_model import card, last_scored, write_site_model
    from fedcore.audit import Fact
    from fedcore.audit_store import AuditLog
    from fedcore.errors import ConfigError

    paths = home_of(home)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends with .safetensors")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    scored, folder = last_scored(paths.local_state, run)
    digest = write_site_model(scored, folder, paths.artifacts, out)
    out.with_suffix(".json").write_text(json.dumps(card(scored, digest), indent=2) + "\n", encoding="utf-8")
    database = open_site_audit(paths.audit)
    try:
        detail: dict[str, str | int | bool] = {"run": scored.run, "round": scored.round, "out": str(out)}
        AuditLog(database).record_now(
            Fact("model.export", person(), object=f"artifact/{scored.digest}", detail=detail)
        )
    finally:
        database.close()
    own = f", {len(scored.own_tensors)} tensors of this site's own" if scored.own_tensors else ""
    typer.echo(f"{out}: run {scored.run}, round {scored.round}{own}")
