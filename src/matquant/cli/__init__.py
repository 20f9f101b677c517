"""The command line: `matquant COMMAND`, or `python -m matquant COMMAND`. docs/CLI.md is its manual.

Exit codes: 0 fine, 2 usage, 3 input, 4 resources, 5 corrupt checkpoint, 130 interrupted; 1 is a bug of ours. An error is one
line on stderr; the traceback is shown with --debug (anywhere on the line) or MATQUANT_DEBUG=1.

torch and transformers are imported by the command that needs them, so that help and usage errors are fast.
"""

import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from matquant.cli import commands
from matquant.errors import MatquantError

# Threads that wait for work by spinning (the default of libgomp) make a program several times slower, not a little, when others are
# busy on the same cores. Must be set before torch is imported; whoever sets it differently is obeyed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BUG = 1
INTERRUPTED = 130
ABOUT = "Quantize an LLM once into one nested integer checkpoint; read it at 8, 6, 4, 3 or 2 bits."
DEBUG_HELP = "show the traceback of an error; may stand anywhere on the line (also MATQUANT_DEBUG=1)"


def application(command: str | None = None) -> typer.Typer:
    """The typer application. Importing the flags of a recipe takes seconds, so only the `command` about to run gets them."""
    app = typer.Typer(help=ABOUT, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback()
    def root(debug: bool = typer.Option(False, "--debug", help=DEBUG_HELP)) -> None: ...

    for name, handler in commands.COMMANDS.items():
        app.command(name)(_complete(handler, wanted=name == command))
    return app


def _complete(handler: Callable[..., None], wanted: bool) -> Callable[..., None]:
    """`handler` with the flags of a recipe if it takes one; a mere line of the list of commands if it is not `wanted`."""
    if "recipe" not in inspect.signature(handler).parameters:
        return handler
    if wanted:
        from matquant.cli.flags import with_recipe_flags

        return with_recipe_flags(handler)

    def listed() -> None: ...

    listed.__doc__ = handler.__doc__
    return listed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    own = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in own or os.environ.get("MATQUANT_DEBUG", "") not in ("", "0")
    args = [arg for arg in own if arg != "--debug"] + args[len(own) :]
    command = next((arg for arg in args if not arg.startswith("-")), None)
    try:
        code = application(command)(args=args or ["--help"], prog_name="matquant", standalone_mode=False)
        return _interrupted(args) if code == INTERRUPTED else code or 0  # typer turns Ctrl-C into this code
    except typer.TyperException as error:  # a usage error that typer found
        return _fail(error.format_message(), error.exit_code)
    except KeyboardInterrupt:
        return _interrupted(args)
    except MatquantError as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone: not an error of anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if debug:
            traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error} (a bug in matquant: run again with --debug and report it)", BUG)


def _interrupted(args: Sequence[str]) -> int:
    again = [arg for arg in args if arg != "--resume"] + ["--resume"]
    hint = f"; to continue: {shlex.join(['matquant', *again])}" if "quantize" in args[:1] and "--dry-run" not in args else ""
    return _fail(f"interrupted{hint}", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
