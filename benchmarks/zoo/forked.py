"""One process for one network, with limits of time and memory; what it told before its end is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

__all__ = ["run_forked"]

_TICKS = os.sysconf("SC_CLK_TCK")


def run_forked(
    work: Callable[[Callable[[dict[str, Any]], None]], None], *, seconds: float, gibibytes: float
) -> dict[str, Any]:
    """Run `work` in a fork of this process and return what it told, merged, and how it ended.

    A fork has all that is imported already, which else takes longer than most networks. This process must not
    have run anything backward: torch's autograd declines to work in forks after that.

    Args:
        work: Called with a function that takes parts of a record.
        seconds: Processor time that it may take, so that other work on the machine does not count; of wall
            time, five times as much.
        gibibytes: Memory that it may hold of its own.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    record: dict[str, Any] = {}
    ended = ""
    pid = process.pid or 0
    inherited = _resident_gib(os.getpid())
    while True:
        if ours.poll(0.2):
            try:
                _merge(record, ours.recv())
            except EOFError:
                break
            continue
        if _processor_seconds(pid) > seconds or time.monotonic() - start > 5 * seconds:
            ended = f"over {seconds:g} s of processor time"
        elif _resident_gib(pid) > gibibytes + inherited:
            ended = f"over {gibibytes:g} GiB of memory"
        if ended:
            os.kill(pid, signal.SIGKILL)
            break
    process.join()
    if not ended and process.exitcode:
        how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else str(process.exitcode)
        ended = f"the process ended with {how}"
    return {**record, "ended": ended}


def _child(work: Callable[[Callable[[dict[str, Any]], None]], None], pipe: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    # Fails where the parent has run backward: folds would be refused one by one, which is no failure to see.
    torch.autograd.backward(torch.ones((), requires_grad=True))
    work(pipe.send)
    pipe.close()


def _merge(record: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(record.get(key), dict):
            record[key].update(value)
        else:
            record[key] = value


def _processor_seconds(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_gib(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            held = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    except OSError:
        return 0.0
    return int(held.get("RssAnon", "0")) / 2**20
