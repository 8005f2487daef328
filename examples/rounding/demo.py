"""Rounding or an error? One MLP as Linears and as 1x1 convolutions, where plain differences mislead.

The MLP 256 -> 64 -> 128 -> 256 returns logits and features, on (16, 5, 256). First every weight is one,
behind ELU: values grow large, and the rounding of the first layer's sums is multiplied 64 * 128 times. Then
weights are small, behind a sigmoid. Right programs of either network have to be accepted and one wrong weight
caught; how small its error may be is searched, not assumed. Ends with an error when a check fails.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphsurgery as gs
from graphsurgery.verify import Baseline, Verdict

MUST_SEE = 1e-3  # a coefficient that is off by so much has to be caught in any layer
FINEST = 22  # halvings; 1 + 2^-22 is two float32 numbers above 1
Outputs = dict[str, Tensor]


class LinearMlp(nn.Module):
    """Linears, for (batch, tokens, 256)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 64), nn.Linear(64, 128), nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Outputs:
        """Return logits (batch, tokens, 256) and features (batch, tokens, 128)."""
        features = self.activation(self.fc2(self.activation(self.fc1(x))))
        return {"logits": self.fc3(features), "features": features}


class ConvMlp(LinearMlp):
    """The same numbers as 1x1 convolutions."""

    def __init__(self, mlp: LinearMlp) -> None:
        super().__init__(mlp.activation)
        for name, layer in mlp.named_children():
            if isinstance(layer, nn.Linear):
                conv = nn.Conv1d(layer.in_features, layer.out_features, 1)
                conv.load_state_dict({"weight": layer.weight[..., None], "bias": layer.bias})
                setattr(self, name, conv)

    def forward(self, x: Tensor) -> Outputs:
        """As the Linears, the axes exchanged before and after."""
        return {name: value.transpose(1, 2) for name, value in super().forward(x.transpose(1, 2)).items()}


@torch.no_grad()
def all_ones() -> LinearMlp:
    mlp = LinearMlp(nn.ELU())
    for name, value in mlp.named_parameters():
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    return mlp.eval()


@torch.no_grad()
def small() -> LinearMlp:
    mlp = LinearMlp(nn.Sigmoid())
    for value in mlp.parameters():
        value.normal_(std=0.02)
    return mlp.eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Outputs:
    return model(x)


def apart(a: Outputs, b: Outputs) -> float:
    """The plain judgement: the largest absolute difference of any value."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def onnx_outputs(path: Path, x: Tensor) -> Outputs:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {session.get_inputs()[0].name: x.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def right_programs(
    title: str, baseline: Baseline, mlp: LinearMlp, x: Tensor, file: Path, console: Console
) -> tuple[float, bool]:
    """Show how far right programs of one network are apart; return the largest distance, and if all pass."""
    conv, reference = ConvMlp(mlp).eval(), run(mlp, x)
    result = gs.optimize(mlp, x, passes=["linear-to-conv1x1"])
    on_onnx = result.export_onnx(file).verdict
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about devices that torch was built without
        with torch.backends.mkldnn.flags(enabled=False):
            other_order, judged = run(conv, x), baseline.compare(conv)
    exact = run(copy.deepcopy(mlp).double(), x.double())
    rows: list[tuple[str, Outputs, Verdict | None]] = [
        ("1x1 convolutions", run(conv, x), baseline.compare(conv)),
        ("... added in another order", other_order, judged),
        ("linear-to-conv1x1", run(result.module, x), result.report.verification),
        ("... on onnxruntime", onnx_outputs(file, x), on_onnx),
        ("exact, in float64", exact, None),
    ]
    largest = max(float(value.abs().max()) for value in reference.values())
    table = Table(title=f"{title}: values up to {largest:,.3g}", title_justify="left")
    for heading in ("beside the Linears", "difference", "verdict", "noise: needed, allowed"):
        table.add_column(heading)
    for name, outputs, verdict in rows:
        words = "" if verdict is None else "equal" if verdict.ok else "DIFFERENT"
        parts = [] if verdict is None else [o.native for o in verdict.outputs if o.native is not None]
        factors = max(((part.factor_needed, part.factor) for part in parts), default=None)
        text = "" if factors is None else f"{factors[0]:.2f}, {factors[1]:.2f} times"
        table.add_row(name, f"{apart(reference, outputs):.1e}", words, text)
    console.print(table)
    residual = max(change.residual or 0.0 for change in result.report.changes)
    print(f"The certificates of the exchanges, before any rounding: {residual:.0e}; 1e-11 would be refused.")
    verdicts = [verdict for _, _, verdict in rows if verdict is not None]
    passed = len(verdicts) == 4 and all(verdict.ok for verdict in verdicts)
    return max(apart(reference, outputs) for _, outputs, _ in rows), passed


def explained(mlp: LinearMlp, x: Tensor) -> bool:
    """Whether the first layer's rounding and the last place of the logits are what the logits are off by."""
    wide = copy.deepcopy(mlp).double()
    with torch.no_grad():
        sums, exact = mlp.fc1(x).double(), wide.fc1(x.double())
    logits, right = run(mlp, x)["logits"], run(wide, x.double())["logits"]
    first = float((sums - exact)[exact > 0].abs().max())  # ELU takes the rest to -1
    largest, off = float(logits.abs().max()), float((logits - right).abs().max())
    place = 2.0 ** (math.floor(math.log2(largest)) - 23)
    print(f"Why so much: the first layer's sums are off by {first:.1e}, and as all weights are one")
    print(f"this comes 64 * 128 times to the logits: {64 * 128 * first:.2g}. They reach {largest:,.0f},")
    print(f"where the last place is {place:.2g}, and are off by {off:.2g}, {off / largest:.0e} of that.")
    return off <= 10 * (64 * 128 * first + place)


def smallest_caught(catches: Callable[[float], bool]) -> float:
    """The smallest of 1/2, 1/4, ... 2^-22 that is caught, by bisection; infinity if not even 1/2 is."""
    if not catches(0.5):
        return math.inf
    caught, missed = 1, FINEST + 1
    while missed - caught > 1:
        middle = (caught + missed) // 2
        caught, missed = (middle, missed) if catches(2.0**-middle) else (caught, middle)
    return 2.0**-caught


def search(
    baseline: Baseline, mlp: LinearMlp, x: Tensor, tolerance: float
) -> dict[str, tuple[float, float, float]]:
    """For one coefficient of each layer the smallest relative error caught by three judges.

    Returns:
        By layer: by the plain difference and `tolerance`, by the verdict's part in float32, by the verdict.
    """
    reference, found = run(mlp, x), {}
    for layer in ("fc1", "fc2", "fc3"):
        verdicts: dict[float, Verdict] = {}

        def wrong(error: float, layer: str = layer) -> ConvMlp:
            conv = ConvMlp(mlp).eval()
            with torch.no_grad():
                conv.get_submodule(layer).get_parameter("weight")[3, 7] *= 1 + error
            return conv

        def judged(
            error: float, verdicts: dict[float, Verdict] = verdicts, wrong: Callable[[float], ConvMlp] = wrong
        ) -> Verdict:
            if error not in verdicts:
                verdicts[error] = baseline.compare(wrong(error))
            return verdicts[error]

        found[layer] = (
            smallest_caught(lambda error, wrong=wrong: apart(reference, run(wrong(error), x)) > tolerance),
            smallest_caught(
                lambda error, judged=judged: any(
                    part.native is not None and not part.native.ok for part in judged(error).outputs
                )
            ),
            smallest_caught(lambda error, judged=judged: not judged(error).ok),
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/rounding"), help="where the ONNX files go")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()

    torch.manual_seed(0)
    x = torch.randn(16, 5, 256)
    networks = {"all weights one, ELU": all_ones(), "small weights, sigmoid": small()}
    baselines = {title: Baseline(mlp, x, samples=4) for title, mlp in networks.items()}
    checks: dict[str, bool] = {}
    tolerance = 0.0
    for (title, mlp), stem in zip(networks.items(), ("ones", "small"), strict=True):
        largest, passed = right_programs(title, baselines[title], mlp, x, out / f"{stem}.onnx", console)
        tolerance = max(tolerance, largest)
        checks[f"{title}: all right programs pass"] = passed
        if stem == "ones":
            checks[f"{title}: rounding explains the difference"] = explained(mlp, x)

    table = Table(title="The smallest error of one weight that is caught", title_justify="left")
    for heading in ("network", "in", f"difference > {tolerance:.2g}", "in float32", "verdict"):
        table.add_column(heading)
    missed = []
    for title, mlp in networks.items():
        found = search(baselines[title], mlp, x, tolerance)
        for layer, errors in found.items():
            table.add_row(title, layer, *("none" if math.isinf(e) else f"{e:.1e}" for e in errors))
            missed.append(errors[0] > errors[2])
        table.add_section()
        finest = min(errors[2] for errors in found.values())
        coarsest = max(errors[2] for errors in found.values())
        checks[f"{title}: caught from {finest:.0e} to {coarsest:.0e}, {MUST_SEE} at least"] = (
            coarsest <= MUST_SEE
        )
    console.print(table)
    print(f"{tolerance:.2g} is the least tolerance that accepts the right programs of both networks.")
    checks["the plain difference misses errors that the verdict catches"] = any(missed)
    for text, right in checks.items():
        console.print(f"{'[green]ok[/]   ' if right else '[bold red]WRONG[/]'} {text}", highlight=False)
    console.print("all checks hold" if all(checks.values()) else "[bold red]a check failed", highlight=False)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
