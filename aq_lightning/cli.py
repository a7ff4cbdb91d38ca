"""The entry point: one verb, one sentence if it cannot be granted."""

from __future__ import annotations

import os
import sys

from jsonargparse import auto_cli

from aq_lightning import distributed
from aq_lightning.commandline import CommandLine, PlanningLine
from aq_lightning.errors import Interrupted, ParityError, RequestError
from aq_lightning.methods import with_files
from aq_lightning.quiet import quiet, unforeseen
from aq_lightning.summary import program
from aq_lightning.verbs import BY_NAME, VERBS, overview, report

_EXIT = {RequestError: 2, ParityError: 1, Interrupted: os.EX_TEMPFAIL}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a request that cannot be granted ends in one sentence and exit code 2, an interrupted run in one and
    75 (``EX_TEMPFAIL``): the same command goes on. ``--debug`` lets the traceback through."""
    quiet()
    given = sys.argv[1:] if arguments is None else arguments
    debug, given = "--debug" in given, [each for each in given if each != "--debug"]
    if arguments is None and not debug:
        sys.excepthook = unforeseen
    try:
        _run(given, called=arguments is not None)
    except (RequestError, ParityError, Interrupted) as error:
        if debug:
            raise
        sentence = str(error) if isinstance(error, Interrupted) else f"error: {error}"
        print(sentence, file=sys.stderr if distributed.leads() else sys.stdout)  # that of the others is shut
        sys.exit(_EXIT[type(error)])


def _run(arguments: list[str], called: bool) -> None:
    """One verb; ``called``: by a program, not from a shell."""
    verb, *rest = arguments or [""]
    if verb in ("", "-h", "--help"):
        print(overview(program()))
    elif verb == "report":
        sys.exit(report(rest))
    elif verb in VERBS:
        sys.exit(auto_cli(VERBS[verb], args=rest, prog=f"{program()} {verb}", as_positional=verb not in BY_NAME))
    elif verb == "plan":
        PlanningLine(["fit", *with_files(rest)], called)
    else:
        CommandLine(with_files(arguments), called)
