"""Progress bar over capture, passes, restore and verification, fed by the pipeline's events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphsurgery import Event

__all__ = ["progress"]


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Event], None]]:
    """Show a bar on `console` while the block runs; yields the callback to feed with events.

    The bar is transient and appears on terminals only: a log keeps the results, not the way there.
    """
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    stages = bar.add_task("starting", total=1)
    passes = bar.add_task("passes", total=1, visible=False)

    def on_event(event: Event) -> None:
        if event.round == 0:
            done = event.index + (event.kind == "stage-done")
            bar.update(stages, description=event.pass_name, completed=done, total=event.total)
            return
        done = event.index + (event.kind != "pass-start")
        label = f"  round {event.round}: {event.pass_name}"
        bar.update(passes, description=label, completed=done, total=event.total, visible=True)

    with bar:
        yield on_event
