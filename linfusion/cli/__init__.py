"""The `linfusion` command: one module a command, this one puts them together.

A wrong call ends with exit code 2 and one line on stderr, an interrupted one with 130 and one that
says what was kept. Paths, a table or the one JSON object of `--json` are all that goes to stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from linfusion.cli.bench import bench
from linfusion.cli.console import Interrupted
from linfusion.cli.convert import convert
from linfusion.cli.evaluate import evaluate
from linfusion.cli.generate import generate
from linfusion.cli.info import info
from linfusion.cli.summary import summary
from linfusion.cli.train import Command as TrainCommand
from linfusion.cli.train import train
from linfusion.cli.upscale import upscale
from linfusion.cli.video import video

app = typer.Typer(
    name="linfusion",
    help="Diffusion models with attention that is linear in the number of pixels.",
    add_completion=False,
    rich_markup_mode=None,  # rich's help cuts off the names of long flags
    pretty_exceptions_enable=False,
)
for command in (generate, upscale, video, info, summary, convert, bench):
    app.command()(command)
app.command("eval")(evaluate)
# Training flags have underscores, as in diffusers; --learning-rate is taken for --learning_rate.
# Those of methods come through as they are.
app.command(
    cls=TrainCommand,
    context_settings={
        "token_normalize_func": lambda flag: flag.replace("-", "_"),
        "ignore_unknown_options": True,
        "allow_extra_args": True,
    },
)(train)

# What a user can put right: a value, a file or folder, an optional package. Anything else is a
# fault of the program and keeps its traceback.
_WRONG_CALL = (ValueError, OSError, ImportError, EOFError)


def _version(wanted: bool) -> None:
    if wanted:
        from linfusion._version import __version__

        typer.echo(f"linfusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code: 0, 2 for a wrong call, 130 when interrupted."""
    # It would say at every start that torchvision is missing, which no pipeline here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="linfusion", standalone_mode=False)
        if code == 130:  # the parser's, of Ctrl-C where no command caught it
            raise Interrupted("nothing was kept")
    except typer.TyperException as error:
        sys.exit(_refuse(error.format_message()))
    except typer.Abort:  # the parser's, of a file that ends too early; it has asked nothing here
        sys.exit(_refuse("a file ends before its time"))
    except Interrupted as error:
        sys.exit(_refuse(f"interrupted; {error}", 130))
    except _WRONG_CALL as error:
        sys.exit(_refuse(str(error) or type(error).__name__))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        sys.exit(_refuse(f"out of memory ({reason}); accepted are smaller sizes or batches"))
    sys.exit(code)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or, as torch says it, on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _refuse(message: str, code: int = 2) -> int:
    message = message.replace("Value error, ", "", 1)  # of the parser of choices
    print(f"linfusion: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
