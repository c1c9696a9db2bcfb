"""The `aios` command line: its commands, `--version`, and what it says about an unknown command.

Exit codes: 0 done, 1 a mistake in what was asked, 2 a mistake in how it was asked, 130 Ctrl-C.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aios_compile import __version__
from aios_compile.cli import (
    artefacts,
    bench,
    bisect,
    compile_target,
    doctor,
    fuzz,
    generate,
    kernels,
    ladder,
    quantize,
    simulate,
)
from aios_compile.cli.options import COMPILE, SAMPLING, command
from aios_compile.cli.output import is_fancy


class Commands(TyperGroup):
    """A group that names its commands when it is asked for one that it does not have."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}; the commands are {', '.join(known)}")
        return super().resolve_command(ctx, args)


def _app(text: str) -> typer.Typer:
    return typer.Typer(
        cls=Commands,
        help=text,
        no_args_is_help=True,
        # Plain help unless a person looks at it; rich costs 50 ms.
        rich_markup_mode="rich" if is_fancy() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


GC_THRESHOLDS = (50_000, 20, 20)  # allocations before a collection; Python's are 700, 10, 10

app = _app("Compile a language model into readable kernels, and run it.")
cache_app = _app("The store of compiled artefacts.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"aios {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


command(app, COMPILE, SAMPLING)(generate.generate)
command(app, COMPILE, SAMPLING)(generate.chat)
command(app, COMPILE, name="compile")(compile_target.compile_model)
command(app)(quantize.quantize)
command(app, COMPILE)(artefacts.report)
command(app, COMPILE)(artefacts.dump)
command(app, COMPILE)(doctor.doctor)
command(app, COMPILE)(bisect.bisect)
command(app, COMPILE)(bench.bench)
command(app)(simulate.replay)
command(app)(simulate.simulate)
command(app, COMPILE)(kernels.kernels)
command(app)(kernels.edit)
command(app, COMPILE)(ladder.ladder)
command(app)(fuzz.fuzz)
command(app, name="env")(artefacts.show_env)
command(cache_app, name="ls")(artefacts.cache_ls)
command(cache_app, name="rm")(artefacts.cache_rm)
command(cache_app, name="path")(artefacts.cache_path)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command line.

    Nearly all objects of a command live until it ends: modules, tables, the engine. Left alone, the
    collector walks over them dozens of times while they are made, and again when Python ends.
    """
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        sys.exit(app())
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
