"""How a program's command line ends: errors as two lines on stderr, findings as lines, and the exit code of the one
table.
"""

import sys
import traceback
from collections.abc import Iterable

import typer

from fedcore.errors import FedimpresError
from fedcore.finding import Finding, Verdict


def run_program(app: typer.Typer) -> None:
    """Run a command line and exit: 0, the error's own code, 130 after Ctrl-C, 70 for our own bugs (with the
    traceback).
    """
    try:
        app()
    except FedimpresError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        sys.exit(_report(error))


def report_findings(findings: Iterable[Finding]) -> None:
    """Print each finding as it comes; what the parts log goes to stderr. Exits with 1 if one failed."""
    from fedcore.logs import configure_logs

    configure_logs("warning")
    failed = False
    for finding in findings:
        typer.echo(str(finding))
        failed = failed or finding.verdict is Verdict.FAILED
    if failed:
        raise typer.Exit(1)


def _report(error: Exception) -> int:
    # Imported late: it loads grpc, which `version` and `--help` need not wait for.
    from fedcore.status import report

    return report(error)
