"""Runs the command line in children, kills them at random moments, and looks at the files they leave.

    python tests/killed.py FOLDER KILLS

Every other child is killed a moment after it begins to write, the rest anywhere on its way. Prints one line
of JSON: how many children were killed, what was found wrong, what a whole run at the end leaves behind.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from graphsurgery.cli.app import main

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NAMES = ("out.onnx", "out.pt2", "out.json")
OLD = b"what was there before"


class Net(nn.Module):
    """A convolution with its norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2)."""
        y: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y


def network() -> nn.Module:
    """The network of the runs."""
    torch.manual_seed(0)
    return Net().eval()


def child(folder: Path) -> int:
    """Start the command in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    outputs = ["-o", folder / NAMES[0], "--save", folder / NAMES[1], "--report", folder / NAMES[2]]
    model = ["optimize", f"{__file__}:network", "--input", "2x3x8x8"]
    try:
        main([*model, *map(str, outputs)])
    except SystemExit as error:
        os._exit(int(error.code or 0))
    os._exit(9)


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def whole(path: Path) -> bool:
    """Whether a file is the old one, absent as before, or a whole new one."""
    data = path.read_bytes()
    if data == OLD:
        return True
    try:
        if path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load_from_string(data))
        elif path.suffix == ".json":
            json.loads(data)
        else:
            return zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    except Exception:  # noqa: BLE001 - whatever says that it is not whole
        return False
    return True


def one(folder: Path, name: signal.Signals, late: bool, seconds: float, chance: random.Random) -> bool:
    """Run one child and kill it; return whether it was still alive."""
    for target in NAMES:
        (folder / target).write_bytes(OLD)
    pid = child(folder)
    until = time.monotonic() + chance.uniform(0, seconds)
    while time.monotonic() < until or late:
        if ended(pid):
            return False
        if late and any(entry.name.startswith(".out") for entry in folder.iterdir()):
            time.sleep(chance.uniform(0, seconds / 2))
            break
        time.sleep(0.002)
    os.kill(pid, name)
    os.waitpid(pid, 0)
    return True


def run(folder: Path, kills: int) -> dict[str, object]:
    """The loop."""
    chance = random.Random(0)
    start = time.monotonic()
    os.waitpid(child(folder), 0)
    seconds = time.monotonic() - start
    wrong = [f"the first run wrote no {name}" for name in NAMES if not (folder / name).is_file()]
    killed = 0
    for turn in range(kills):
        name = SIGNALS[turn % len(SIGNALS)]
        killed += one(folder, name, turn % 2 == 0, seconds, chance)
        wrong += [f"{n} after {name.name}, {turn}" for n in NAMES if not whole(folder / n)]
    os.waitpid(child(folder), 0)
    wrong += [f"the last run left an old {n}" for n in NAMES if (folder / n).read_bytes() == OLD]
    left = sorted(entry.name for entry in folder.iterdir() if entry.name not in NAMES)
    return {"killed": killed, "wrong": wrong, "left behind after a whole run": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
