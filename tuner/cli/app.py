"""The command line: wires the commands, and ends each of them in output or in one line and an exit code."""

import logging
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from profiles.hardware.software import draftpick_version
from profiles.records.errors import DraftpickError
from profiles.records.text import command
from tuner.cli import bundle, check, explain, forget, lookup, plan, report, run, search, show, verify
from tuner.cli.messages import EXIT_INTERRUPTED, missing_extra
from tuner.cli.output import print_notes

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Find which draft and speculation length decode fastest on this machine, and prove it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"draftpick {draftpick_version()}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("check")(check.check)
app.command("search")(search.search)
app.command("show")(show.show)
app.command("lookup")(lookup.lookup)
app.command("plan")(plan.plan)
app.command("explain")(explain.explain)
app.command("report")(report.report)
app.add_typer(bundle.app, name="bundle")
app.command("forget")(forget.forget)
app.command("verify")(verify.verify)


def main() -> None:
    """Runs the command of `sys.argv`; every failure is one line on stderr and an exit code."""
    arguments = sys.argv[1:]
    _show_notes_of_measuring()
    try:
        os.getcwd()
    except OSError:
        _fail("the working directory is not there any more; change to another", 2)
    try:
        code = app(arguments or ["--help"], prog_name=command(), standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C outside of the measuring
            print_notes("error: interrupted")
        sys.exit(code)
    except OSError as error:  # all others are translated where they arise
        _fail(f"output: {error.strerror or error}", 2)
    except TyperException as error:
        _fail(error.format_message().rstrip("."), 2)
    except DraftpickError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        message = missing_extra(arguments[0] if arguments else "", error)
        if message is None:
            raise
        _fail(message, 2)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_notes(record.getMessage())


def _show_notes_of_measuring() -> None:
    """What is logged while a run measures, such as what disturbs it, is for the user."""
    for name in ("profiles", "tuner"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_Notes())
            logger.setLevel(logging.INFO)


def _fail(message: str, code: int) -> None:
    print_notes(f"error: {message}")
    sys.exit(code)


if __name__ == "__main__":
    main()
