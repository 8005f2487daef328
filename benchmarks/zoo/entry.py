"""One network of the zoo, and how its weights come to look like trained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Entry", "as_trained"]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        name: Unique, `"timm/beit_base_patch16_224"`.
        family: The row of the table it is counted in.
        make: Makes the network, in evaluation mode, and example inputs as `graphsurgery.optimize` takes them.
        note: What is not the default about it, as `"64 x 64"`.
    """

    name: str
    family: str
    make: Callable[[], tuple[nn.Module, Any]]
    note: str = ""


def as_trained(model: nn.Module, example: Any) -> nn.Module:
    """Replace what an untrained network is recognised by, in place; evaluation mode.

    Parameters that are constant (zero heads, layer scales of 1e-6, norms of ones) get values of their own,
    scales of norms some negative ones; every batch norm gets the statistics of random inputs. Where the
    network does not run in training mode, statistics are drawn.

    Args:
        model: The network.
        example: A tensor, a tuple of positional or a mapping of keyword inputs, of two samples.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            _vary(parameter)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.track_running_stats]
        for norm in norms:
            _draw_statistics(norm)
        if norms and not _gather(model, example, norms):
            for norm in norms:
                _draw_statistics(norm)
    return model.eval()


def _vary(parameter: Tensor) -> None:
    if not parameter.is_floating_point() or parameter.numel() < 2:
        return
    value = parameter.flatten()[0].item()
    if not bool((parameter == value).all()):
        return
    if value == 0:
        parameter.normal_(std=0.02)
    else:
        parameter.uniform_(0.5, 1.5)
        parameter.view(-1)[::5].neg_()


def _draw_statistics(norm: nn.modules.batchnorm._BatchNorm) -> None:
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.normal_(std=0.5)
        norm.running_var.uniform_(0.5, 2)


def _gather(model: nn.Module, example: Any, norms: list[nn.modules.batchnorm._BatchNorm]) -> bool:
    """Run in training mode, so that norms take the statistics of noise; whether that worked."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    model.train()
    try:
        _call(model, torch.utils._pytree.tree_map(_noise, example))
    except Exception:  # noqa: BLE001 - whatever training mode asks for that inference does not
        return False
    finally:
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return all(bool(norm.num_batches_tracked) for norm in norms if norm.num_batches_tracked is not None)


def _noise(leaf: Any) -> Any:
    """Twice the samples of a floating-point input, as noise."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    doubled = torch.cat([leaf, leaf])
    return torch.randn_like(doubled) if doubled.is_floating_point() else doubled


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
