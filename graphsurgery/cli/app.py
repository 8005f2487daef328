"""The commands: `optimize`, `verify`, `inspect`, `split-head`, `passes`.

Exit codes: 0 done and verified; 1 verification failed; 2 bad usage or model; 3 a bug of graphsurgery's own;
130 interrupted; 143 told to end (SIGTERM).
"""

from __future__ import annotations

import json
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.text import Text

import graphsurgery as gs
from graphsurgery.cli import parts, run, show
from graphsurgery.cli.errors import UsageError

__all__ = ["app", "main"]

P = ParamSpec("P")
OUT = Console()
ERR = Console(stderr=True)

app = typer.Typer(
    name="graphsurgery",
    help="Fold a trained PyTorch network into a cheaper one, prove that it is the same, export it to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "package.module:factory, path/to/file.py:factory, or a .pt2 file."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Side = f"{MODEL_HELP[:-1]}, or an .onnx file."
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="One input of the model, as 1x3x224x224, 1x16:int64 or name=1x16:int64; repeat for more.",
    ),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="INPUT.AXIS=NAME",
        help="A free size, as 0.2=height (the first input's), ids.1=sequence:2..512 or 0.2=32*h; repeat for "
        "more. Replaces the default, a free batch.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE.npz|FOLDER",
        help="Compare on these inputs too: arrays (or .npy files) called as the inputs, axis 0 = samples.",
    ),
]
DataLimit = Annotated[
    int | None,
    typer.Option("--data-limit", metavar="N", min=1, help="Run at most N samples of the data."),
]
Opset = Annotated[
    int | None,
    typer.Option("--opset", metavar="N", help="Opset of the ONNX file, 18 or later (20, or as needed)."),
]
RUNTIMES = ", ".join(gs.RUNTIMES)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


class VerifyMode(str, Enum):
    """When `optimize` compares the graph with the original."""

    FINAL = "final"
    EACH_PASS = "each-pass"
    OFF = "off"


class CostMode(str, Enum):
    """What `optimize` decides by."""

    FLOPS = "flops"
    MEASURED = "measured"


def _exit_codes(command: Callable[P, int]) -> Callable[P, None]:
    """Turn what a command raises or returns into one sentence on stderr and an exit code."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        code, kind, message = 0, "", ""
        try:
            with warnings.catch_warnings():
                # torch and its exporter warn about their own internals; what matters is in the report's notes
                warnings.simplefilter("ignore")
                code = command(*args, **kwargs)
        except gs.VerificationError as error:
            code, kind, message = 1, type(error).__name__, str(error)
        except (UsageError, gs.GraphSurgeryError) as error:
            code, kind, message = 2, type(error).__name__, str(error)
        except KeyboardInterrupt:
            code, kind = 130, "KeyboardInterrupt"
            message = "interrupted; a file that was not finished is not there, or is the old one"
        except SystemExit as error:  # the user's code would else end this program with a code of its own
            code, kind = 2, "SystemExit"
            message = (
                f"the code of the model ended the program by sys.exit({error.code!r}) before anything was "
                "done or compared; take that call out of what runs on import, in the factory and in forward."
            )
        except Exception as error:  # noqa: BLE001 - a bug of ours must not look like a failed verification
            ERR.print(traceback.format_exc(), markup=False, highlight=False)
            code, kind, message = 3, type(error).__name__, f"this is a bug of graphsurgery: {error}"
        if message:
            if kwargs.get("as_json"):
                typer.echo(json.dumps({"error": {"kind": kind, "message": message}, "exit_code": code}))
            ERR.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        raise typer.Exit(code)

    return wrapped


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphsurgery {gs.__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
@_exit_codes
def optimize(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT.onnx|FOLDER", help="Write the result as ONNX."),
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--passes", metavar="NAME[,NAME...]", help="Run these passes only, in this order."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="PASS.KEY=VALUE",
            help="An option of a pass that runs, as linear-to-conv1x1.layout=channels-last; repeat for more.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="OUT.pt2", help="Write the result as an exported program."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="REPORT.json", help="Write the report as JSON.")
    ] = None,
    verify: Annotated[
        VerifyMode, typer.Option("--verify", help="When to compare with the original.")
    ] = VerifyMode.FINAL,
    data: Data = None,
    data_limit: DataLimit = None,
    opset: Opset = None,
    cost: Annotated[
        CostMode,
        typer.Option("--cost", help="Decide by counts alone, or time on onnxruntime what counts leave open."),
    ] = CostMode.FLOPS,
    in_parts: Annotated[
        bool,
        typer.Option(
            "--parts", help="Fold the submodules that can be captured; -o is a folder of ONNX files."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Fold MODEL, verify the result, and write it as ONNX."""
    request = run.Request(
        model,
        tuple(inputs or ()),
        _split(passes),
        verify.value,
        output,
        save,
        report,
        tuple(options or ()),
        data,
        data_limit,
        opset,
        cost.value,
        tuple(dynamic or ()),
    )
    outcome = parts.optimize_parts(request, ERR) if in_parts else run.optimize(request, ERR)
    if as_json:
        typer.echo(outcome.report.to_json())
    else:
        _show(show.outcome(outcome))
    return 0 if outcome.ok else 1


@app.command()
@_exit_codes
def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The reference: {Side}")],
    candidate: Annotated[
        str, typer.Argument(metavar="B", help="What is compared with it, in the same forms.")
    ],
    inputs: Inputs = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", metavar="NAME", help=f"Run B on it; repeat for more: {RUNTIMES}."),
    ] = None,
    locate: Annotated[
        bool, typer.Option("--locate/--no-locate", help="Find the first value that differs, if any.")
    ] = True,
    dynamic: Dynamic = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Run other batch sizes than the example's too.")
    ] = False,
    data: Data = None,
    data_limit: DataLimit = None,
    as_json: Json = False,
) -> int:
    """Tell whether A and B compute the same function, up to rounding.

    Exit code 0: equal; 1: different; 2: they could not be compared, or not on every runtime named.
    """
    found = run.verify(
        reference,
        candidate,
        list(inputs or ()),
        list(runtimes or ()),
        ERR,
        locate=locate,
        dynamic_batch=dynamic_batch,
        dynamic=dynamic or (),
        data=data,
        data_limit=data_limit,
    )
    if as_json:
        typer.echo(run.verdict_json(found))
    else:
        _show(show.compared(found))
    if not found.verdict.ok:
        return 1
    return 0 if getattr(found.verdict, "complete", True) else 2  # a runtime that was asked for did not run


@app.command()
@_exit_codes
def inspect(model: Model, inputs: Inputs = None, dynamic: Dynamic = None, as_json: Json = False) -> int:
    """Tell what could be folded in MODEL and what cannot, and why; nothing is changed."""
    found = run.inspect(model, list(inputs or ()), ERR, dynamic=dynamic or ())
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(show.inspection(found))
    return 0


@app.command("split-head")
@_exit_codes
def split_head(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.onnx", help="Write the result as ONNX.")
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="PATH", help="The head's module, as fc; else the last one."),
    ] = None,
    keep_head: Annotated[
        bool,
        typer.Option(
            "--keep-head/--through-r",
            help="Logits from the head itself, or from the class-specific features.",
        ),
    ] = True,
    opset: Opset = None,
    as_json: Json = False,
) -> int:
    """Split the features of MODEL's head into those that reach the logits and those that cannot."""
    found = run.split_head(
        model, list(inputs or ()), head, keep_head, output, ERR, opset=opset, dynamic=dynamic or ()
    )
    if as_json:
        typer.echo(found.report.to_json())
    else:
        _show(show.outcome(found))
    return 0


@app.command()
@_exit_codes
def passes(as_json: Json = False) -> int:
    """List the passes."""
    described = run.describe_passes()
    own = {item.name for item in gs.passes.ALL_PASSES}
    for item in described:  # those of other packages never run unasked, whatever they declare
        item["default"] = item["default"] and item["name"] in own
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        _show([show.passes(described)])
    return 0


def _show(lines: Iterable[RenderableType]) -> None:
    """Print tables in the terminal's width, sentences whole: a broken path cannot be clicked or searched."""
    for line in lines:
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, (str, Text)))


def _split(names: list[str] | None) -> tuple[str, ...] | None:
    """Flatten `--passes a,b --passes c` to `("a", "b", "c")`; None where the option was not given."""
    if names is None:
        return None
    found = tuple(name.strip() for text in names for name in text.split(",") if name.strip())
    if not found:
        raise UsageError("--passes names no pass; `graphsurgery passes` lists them.")
    return found


def main(argv: list[str] | None = None) -> Any:
    """Run the command line and exit with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # so that what is half done is tidied up
    try:
        app(args=argv)
    except _ToldToEnd:
        raise SystemExit(128 + signal.SIGTERM) from None


class _ToldToEnd(BaseException):
    """The program was sent a SIGTERM; no SystemExit, which code of the user's may raise on its own."""


def _end(*_: object) -> None:
    raise _ToldToEnd
