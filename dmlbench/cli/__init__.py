"""The command ``dmlbench``: one file per verb, read only when the verb is used.

A verb's file holds a click command of the same name. Commands parse, call and print; the only
mathematics here is in what they call. Errors: one line on stderr and the exit code of the error
(``--debug`` shows the traceback); what is no :class:`DmlbenchError` is a defect, with an exit code of its own.
"""

import codecs
import contextlib
import importlib
import io
import os
import signal
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from dmlbench.errors import DataError, DmlbenchError
from dmlbench.registry import suggest
from dmlbench.user_code import blame
from dmlbench.version import __version__

_BARE: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click since 8.2 raises for a group without a command; before, it prints the help itself."""
INTERRUPTED = 130
LEFT = 141
"""Nobody reads the output to its end: what a shell says of a process that ``SIGPIPE`` ended."""
INTERNAL = 70
"""A defect of dmlbench (EX_SOFTWARE of sysexits.h); 1 is the answer no of ``compare``, ``validate`` and others."""

VERBS = {
    "evaluate": "score a model: benign metrics, every attack part, ERS",
    "merge": "join the shards of an evaluation into one result",
    "audit": "does a model's measured robustness mean what it says?",
    "train": "train a model from a recipe",
    "register": "put finished training runs into a registry",
    "table": "make a table of runs for a paper: LaTeX, Markdown or CSV",
    "plot": "draw runs for a paper: PDF, SVG or PNG",
    "report": "make one HTML page of run folders",
    "models": "list, show and inspect models",
    "datasets": "list, show, prepare and verify data sets",
    "attacks": "list and show attacks",
    "protocols": "list and show protocols",
    "compare": "the CI gate: is one result worse than another?",
    "leaderboard": "show the board, build it and its site",
    "submit": "make a bundle to submit",
    "validate": "check a bundle, level 0 to 4",
    "verify": "measure a bundle again, in full",
    "schema": "print the JSON Schema of a file format",
}
"""Verb to its one-line help; the command is ``dmlbench.cli.<verb>:<verb>``."""


class LazyGroup(click.Group):
    """Lists every verb at once, imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"dmlbench.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            raise click.UsageError(f"unknown command {args[0]!r}{suggest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click itself would make exit code 1 of it, which a gate that failed has
            _silence(sys.stdout)
            _silence(sys.stderr)
            raise click.exceptions.Exit(LEFT) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        verbs = [
            CompletionItem(verb, help=help_text) for verb, help_text in VERBS.items() if verb.startswith(incomplete)
        ]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dmlbench")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """How robust is an embedding model?

    Example: dmlbench evaluate --model digits-smallcnn-triplet-hm-lga-ics
    """


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):
        click.echo(f"Error: {message}", err=True)
    raise SystemExit(code)


def _surroundings(error: OSError | MemoryError) -> str:
    """What the machine refused, and where."""
    if isinstance(error, MemoryError):
        return f"memory does not suffice: {' '.join(str(error).split()) or 'an array cannot be made'}"
    where = "standard output or a file" if error.filename is None else str(error.filename)
    return f"{where}: {error.strerror or error}"


def _silence(stream: Any) -> None:
    """Let what is still to be written nowhere fail no more when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())


_PLAIN = str.maketrans(
    {"↑": "^", "↓": "v", "▲": "^", "▼": "v", "–": "-", "−": "-", "…": "~", "→": ">", "×": "x", "±": "~"}
)


def legible() -> None:
    """Let what the encoding of an output lacks be written as its nearest ASCII, else as "?": no result is lost for an arrow."""

    def nearest(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = unicodedata.normalize("NFKD", error.object[error.start : error.end].translate(_PLAIN))
        return text.encode("ascii", "replace").decode("ascii"), error.end

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    codecs.register_error("dmlbench", nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="dmlbench")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command and exit; the entry point of the console script."""
    arguments = sys.argv[1:] if argv is None else argv
    legible()
    warnings.filterwarnings("ignore", module="PIL")  # about pictures that it reads all the same
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line
        arguments = ["--debug", *[a for a in arguments if a != "--debug"]]
    with contextlib.suppress(ValueError):  # another thread than the main one takes no signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = cli.main(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except _BARE as error:  # a group without a command is asked what it has
        click.echo(error.ctx.get_help())
        raise SystemExit(0) from None
    except click.ClickException as error:
        if debug:
            raise
        _fail(error.format_message().replace("\n", " "), error.exit_code if error.exit_code != 1 else 2)
    except DmlbenchError as error:
        if debug:
            raise
        _fail(" ".join(str(error).split("\n")), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        raise SystemExit(LEFT) from None
    except (OSError, MemoryError) as error:  # what the surroundings do: a full disk, permissions, no memory
        if debug:
            raise
        _silence(sys.stdout)
        _fail(_surroundings(error), DataError.exit_code)
    except Exception as error:
        if debug:
            raise
        if blamed := blame(error):
            _fail(blamed, DataError.exit_code)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        _fail(f"internal error: {text}; please report it, --debug shows the traceback", INTERNAL)
    raise SystemExit(code if isinstance(code, int) else 0)
