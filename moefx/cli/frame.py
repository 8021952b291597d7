"""What all commands share: the Typer app, errors and exit codes, and the rule that stdout carries data only."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from moefx import __version__
from moefx.errors import InputError, MoefxError

# The usage error of whichever click Typer brings with it.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERNAL_ERROR = 1

HELP = """Make diffusion models sparse: trace, find, plan, rewrite, prove.

A MODEL is one of

- [bold]package.module:factory[/bold], a callable that returns a module, or (module, inputs);
- [bold]diffusers:ClassName[/bold], a tiny random instance, or one built from --config file.json;
- the path of a folder that moefx saved.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 2 usage, 3 nothing matched, 4 verification failed,
5 unsafe input. MOEFX_DEBUG=1 shows tracebacks."""


class Commands(TyperGroup):
    """The command group: turns every error into three readable parts and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run; remember whether errors are wanted as JSON, even those of the command line itself."""
        given = list(sys.argv[1:] if args is None else args)
        self.wants_json = "--json" in given or "--format=json" in given or ("--format", "json") in _pairs(given)
        return super().main(args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except MoefxError as error:
            self._report(error, error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except UsageError as error:
            if self.wants_json:
                _emit_error("UsageError", error.format_message(), "", "see --help", 2)
            raise
        except (typer.Exit, typer.Abort, KeyboardInterrupt, EOFError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if debugging():
                raise
            found = f"{type(error).__name__}: {error}"
            do = "set MOEFX_DEBUG=1 for the traceback and report it"
            self._report(MoefxError("an error inside moefx", found=found, do=do), INTERNAL_ERROR)
            raise typer.Exit(INTERNAL_ERROR) from error

    def _report(self, error: MoefxError, code: int) -> None:
        if debugging():
            raise error
        from moefx.inspect.text import clean

        lines = "\n".join(clean(line) for line in str(error).splitlines())
        typer.echo(f"error: {lines}", err=True)
        if self.wants_json:
            _emit_error(type(error).__name__, error.asked, error.found, error.do, code)


def _pairs(given: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(given))


def _emit_error(kind: str, asked: str, found: str, do: str, code: int) -> None:
    error = {"type": kind, "asked": asked, "found": found, "do": do, "exit_code": code}
    emit(json.dumps({"format": "moefx.error", "schema_version": 1, "error": error}, indent=1) + "\n")


def debugging() -> bool:
    """Tell whether tracebacks are wanted."""
    return os.environ.get("MOEFX_DEBUG", "") not in ("", "0")


app = typer.Typer(
    cls=Commands,
    name="moefx",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        emit(f"moefx {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""
    del version


def main() -> None:
    """Run the command line: the entry point ``moefx``."""
    app(prog_name="moefx")


def emit(text: str, out: Path | None = None) -> None:
    """Write data to stdout, or to a file as a whole; a reader that has seen enough is no error.

    Raises:
        InputError: the file cannot be written.
    """
    if out is not None:
        _write(out, text)
        return
    try:
        typer.echo(text.encode("utf-8"), nl=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nothing more can be said to stdout, and the interpreter must not try when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _write(path: Path, text: str) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise InputError(
            f"write {str(path)!r}", found=error.strerror or type(error).__name__, do="choose another --out"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    typer.echo(f"warning: {message}", err=True)


@contextlib.contextmanager
def working(verbosity: int) -> Iterator[None]:
    """Let what other code prints go to stderr, and logs as loud as asked for (-1 quiet, 0, 1 info, 2 debug)."""
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logger = logging.getLogger("moefx")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if verbosity < 0:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
