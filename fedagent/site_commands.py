"""fedagent's commands for the people of the site: policy, pause, status, checks. They never need the coordinator's leave."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.program import report_findings

if TYPE_CHECKING:
    from fedagent.config import AgentConfig, AgentHome
    from fedcore.credential import Credential

HomeOption = Annotated[Path, typer.Option("--home", help="The agent's folder.", file_okay=False)]
DataOption = Annotated[Path | None, typer.Option("--data", help="The site's images; overrides agent.toml.")]

policy_app = typer.Typer(no_args_is_help=True, help="What this site allows: policy.toml.")


@policy_app.command("show")
def policy_show(home: HomeOption) -> None:
    """Show the policy in force, and whether this site takes work now."""
    from fedagent.config import AgentConfig, AgentHome
    from fedagent.gate import SiteGate
    from fedagent.policy import load_policy, policy_lines
    from fedcore.config import load_config

    paths = AgentHome(home)
    policy = load_policy(paths.policy)
    config = load_config(paths.config, AgentConfig)
    typer.echo(f"{paths.policy}{'' if paths.policy.exists() else ' (no such file: everything is allowed)'}")
    for line in policy_lines(policy):
        typer.echo(f"  {line}")
    shared = "shared" if config.policy.share_class_metrics else "not shared"
    typer.echo(f"  {'class metrics':16} {shared} (agent.toml)")
    typer.echo(f"now: {SiteGate(paths.paused, policy).refusal(None) or 'takes work'}")


def pause_command(
    home: HomeOption,
    reason: Annotated[str, typer.Option(help="Why; the operators of the federation see it.")] = "",
) -> None:
    """Stop working for the federation until `resume`. A running agent gives up its task at once; a restart changes
    nothing.
    """
    from fedagent.pause import pause, paused_reason

    paths = home_of(home)
    pause(paths.paused, reason, datetime.now(UTC))
    typer.echo(paused_reason(paths.paused))


def resume_command(home: HomeOption) -> None:
    """Work again after `pause`."""
    from fedagent.pause import resume

    typer.echo("resumed" if resume(home_of(home).paused) else "was not paused")


def status_command(home: HomeOption) -> None:
    """Say whether the agent runs, is connected and takes work. Exits with 8 if it does not."""
    from fedagent.gate import SiteGate
    from fedagent.policy import load_policy
    from fedagent.status_file import read_status
    from fedcore.home_lock import holder

    paths = home_of(home)
    pid = holder(paths.lock)
    refusal = SiteGate(paths.paused, load_policy(paths.policy)).refusal(None)
    if pid is None:
        typer.echo("not running" + (f"; {refusal}" if refusal else ""))
        raise typer.Exit(8)
    said = read_status(paths.status)
    if said is None:
        typer.echo(f"running (process {pid}), starting")
        raise typer.Exit(8)
    typer.echo(f"site {said.site}, running (process {pid})")
    typer.echo(f"{said.summary()} (since {said.since:%Y-%m-%d %H:%M:%S} UTC)")
    if said.refusal or not said.connected:
        raise typer.Exit(8)


def check_config_command(home: HomeOption) -> None:
    """Check configuration, policy and credential of a home, without connecting."""
    paths, config, credential = _checked(home, datetime.now(UTC))
    typer.echo(f"ok  {paths.config}: {config.data.kind} data at {config.data.path or '(given by --data)'}")
    told = "" if paths.policy.exists() else "no such file, everything is allowed"
    typer.echo(f"ok  {paths.policy}: {told or 'valid; fedagent policy show'}")
    typer.echo(
        f"ok  {paths.credential}: {credential.subject.spiffe_id}, coordinator {credential.coordinator}, "
        f"until {credential.certificate.not_valid_after_utc:%Y-%m-%d}"
    )


def preflight_command(home: HomeOption, data: DataOption = None) -> None:
    """Check what `serve` needs: disk, device, data, certificate, coordinator. One line each; exits with 1 if one fails."""
    from fedagent.doctor import preflight

    now = datetime.now(UTC)
    paths, config, credential = _checked(home, now, data, allow_expired=True)
    report_findings(preflight(paths, config, credential, now))


def doctor_command(home: HomeOption, data: DataOption = None) -> None:
    """Find out why a site does not work: DNS, TCP, TLS, inspection by a proxy, certificate, clock, protocol, throughput,
    device, data, /dev/shm, disk. One line each; exits with 1 if one fails.
    """
    from fedagent.doctor import doctor

    now = datetime.now(UTC)
    paths, config, credential = _checked(home, now, data, allow_expired=True)
    report_findings(doctor(paths, config, credential, now))


def migrate_command(
    home: HomeOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try it on a copy; change nothing.")] = False,
) -> None:
    """Bring the agent's database to this version; `serve` does it too. A copy is kept beside it."""
    from fedagent.schema import MIGRATIONS
    from fedcore.home_lock import HomeLock
    from fedcore.migration import migrate_file

    paths = home_of(home)
    with HomeLock(paths.lock):
        typer.echo(migrate_file(paths.audit, MIGRATIONS, dry_run=dry_run))


def add_to(app: typer.Typer) -> None:
    """Give these commands to the program."""
    app.add_typer(policy_app, name="policy")
    for name, command in (
        ("pause", pause_command),
        ("resume", resume_command),
        ("status", status_command),
        ("check-config", check_config_command),
        ("preflight", preflight_command),
        ("doctor", doctor_command),
        ("migrate", migrate_command),
    ):
        app.command(name)(command)


def home_of(home: Path) -> "AgentHome":
    """The agent's home. Raises ConfigError if there is no such folder."""
    from fedagent.config import AgentHome
    from fedcore.errors import ConfigError

    if not home.is_dir():
        raise ConfigError(
            f"{home}: no such folder", hint="--home names the folder that `fedagent enroll` made"
        )
    return AgentHome(home)


def _checked(
    home: Path, now: datetime, data: Path | None = None, *, allow_expired: bool = False
) -> "tuple[AgentHome, AgentConfig, Credential]":
    """The home with everything in it read. Raises ConfigError, IdentityError."""
    from fedagent.config import AgentHome, load_agent_config
    from fedagent.policy import load_policy
    from fedcore.credential import load_credential

    paths = AgentHome(home)
    config = load_agent_config(paths, data)
    load_policy(paths.policy)
    return paths, config, load_credential(paths.credential, now, allow_expired=allow_expired)
