"""How a program's command line ends: errors as two lines on stderr, and the exit code of the one table."""

import sys
import traceback

import typer

from fedcore.errors import FedimpresError


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


def _report(error: Exception) -> int:
    # Imported late: it loads grpc, which `version` and `--help` need not wait for.
    from fedcore.status import report

    return report(error)
