"""The command line: which command is meant, and what becomes of whatever goes wrong."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from itda._version import __version__
from itda.cli import terminal, watch
from itda.cli.compare import compare, diff
from itda.cli.look import decompose, demo, hooks, page, show, uses
from itda.cli.measure import eval_, export
from itda.cli.train import collect, sae, sweep, train
from itda.errors import InputError
from itda.progress import telling
from itda.shortages import shortage

COMMANDS = {
    command.name: command
    for command in (train, sae, sweep, collect, hooks, decompose, show, uses, page, eval_, compare, diff, export, demo)
}
HELP = """\
usage: itda COMMAND ... [--json] [--debug]

Dictionaries of real activations: what a language model represents, as sparse sums of atoms with a label.

commands:
{commands}

options:
  -h, --help    show this help; after a command, its own: what most people need
  --help-all    after a command, all of its settings
  --version     show the version
  --json        print the result on standard output as one JSON document, everything else on standard error
  --debug       show the traceback of an unexpected error (as ITDA_DEBUG=1 does)

examples:
  itda demo
  itda train gpt2 book.txt --layer 8 --out gpt2-8
  itda collect gpt2 book.txt --layer 4 8 --out gpt2-acts
  itda decompose gpt2-8 "The mouse sat on the carpet"
  itda uses gpt2-8 book.txt
  itda show gpt2-8 --atom 17
  itda page gpt2-8 --out gpt2-8-page
  itda eval gpt2-8 other-book.txt
  itda compare gpt2 distilgpt2 --data book.txt
  itda diff gpt2 gpt2-tuned book.txt --html diff.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process unless given) and return its exit status.

    0 success, 1 a fault of itda's, 2 bad usage or input, 130 Ctrl-C, 143 SIGTERM, 141 standard output closed early.
    The command line of the process runs in a child where a library may end it without a word (`watch`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and watch.is_needed():
        return watch.watched(lambda: main(words), _command(words))
    debug = os.environ.get("ITDA_DEBUG", "0") not in ("", "0") or "--debug" in words
    words = [word for word in words if word != "--debug"]
    here = _command(words)
    if sys.stdout is None:
        return terminal.fail("standard output is closed, and there is something to say on it: leave it open.", debug)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # whatever the text, and the encoding of the terminal
    try:
        with terminal.signals.caught(), telling(terminal.say), terminal.notices():
            _run(words)
        return 0
    except SystemExit as end:  # tyro, after its help
        return int(end.code or 0)
    except InputError as error:
        return terminal.fail(str(shortage(error, f"{here} could not go on") or error), debug)
    except KeyboardInterrupt as error:
        return terminal.interrupted(error)
    except BrokenPipeError:
        terminal.abandon_output()
        return 128 + 13  # what a shell reports of a process that SIGPIPE ends
    except OSError as error:
        terminal.abandon_output()
        where = f"{error.filename}: " if error.filename else ""
        if said := shortage(error, f"{here} could not go on ({where}{error.strerror or error})"):
            return terminal.fail(str(said), debug)
        return terminal.fail(f"{where}{error.strerror or error}: check the place and its permissions.", debug)
    except Exception as error:
        if said := shortage(error, f"{here} could not go on"):
            return terminal.fail(str(said), debug)
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        terminal.fail(
            f"this should not have happened ({what}): please report it, with what the same command with --debug says.",
            debug,
        )
        return 1


def _command(words: list[str]) -> str:
    """What a sentence calls the command."""
    return f"`{' '.join(['itda', *words[:1]])}`"


def _run(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        lines = (f"  {name:<13} {command.summary}" for name, command in COMMANDS.items())
        terminal.write(HELP.format(commands="\n".join(lines)))
    elif name == "--version":
        terminal.write(f"itda {__version__}\n")
    elif name in COMMANDS:
        terminal.parsed(COMMANDS[name], words[1:])()
    else:
        raise InputError(f"There is no command {name!r}: choose one of {', '.join(COMMANDS)}, or see `itda --help`.")


if __name__ == "__main__":
    sys.exit(main())
