"""The small matrix of a stretch that acts on channels, at every position alike."""

from __future__ import annotations

from collections.abc import Collection

import torch

from graphsurgery.affine.roles import Roles
from graphsurgery.errors import NotAffineError
from graphsurgery.matrix.rows import sparse
from graphsurgery.matrix.segments import Segment

_UNIFORM = 1e-12  # of the largest value of the shift: what rounding at different positions may leave


def channel_matrix(
    segment: Segment | None, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """The matrix and the bias of channels.

    Args:
        segment: the stretch; None where it is more than one.
        shift: its value at zero, in the shape of a sample of its output.

    Returns:
        The matrix (out, in) and bias (out,), float64, and the axes of the channels in input and output.

    Raises:
        NotAffineError: positions are mixed, or treated differently.
    """
    axes = None if segment is None else _axes(segment)
    if segment is None or axes is None:
        raise NotAffineError(
            "the stretch is not one matrix that is applied to the channels at every position alike: it reads "
            "windows, mixes several axes, or treats positions differently; ask for form='sparse'.",
            "structure",
        )
    rank = len(segment.roles.exit)
    channels = shift.movedim(axes[1] - rank, -1)
    lines = channels.reshape(-1, channels.shape[-1])
    if len(lines) > 1:
        spread = float((lines.amax(0) - lines.amin(0)).max())
        if spread > _UNIFORM * float(lines.abs().max()):
            raise NotAffineError(
                f"the bias of the stretch differs from position to position by {spread:.3g}, so no bias of "
                "channels alone stands for it; ask for form='sparse'.",
                "position-bias",
            )
    alone = segment.at_one_position()
    return sparse(alone.rows(), alone.shape).to_dense(), lines[0].clone(), axes


def _axes(segment: Segment) -> tuple[int, int] | None:
    """The axes of the channels in entry and exit, where all other axes are carried alike and in order."""
    roles = segment.roles
    if roles.windowed:
        return None
    into = _sole(roles.entry, {*roles.gone, *roles.varied}, roles.entry_sizes)
    out = _sole(roles.exit, {*roles.fresh, *roles.varied}, roles.exit_sizes)
    if into is None or out is None:
        return None
    if into == out == -1:  # one channel on both sides: the first axis that is as short, as layers have it
        into = next((i for i, dim in enumerate(roles.entry[1:], 1) if not _real(dim, roles)), 0)
    # Where there is one channel only, no axis shows it: it is taken to stay where it was.
    into, out = (out if into < 0 else into), (into if out < 0 else out)
    if not 0 < into < len(roles.entry) or not 0 < out < len(roles.exit):
        return None
    entry, exit_ = (_others(layout, i, roles) for layout, i in ((roles.entry, into), (roles.exit, out)))
    return (into, out) if entry == exit_ else None


def _sole(layout: tuple[tuple[int, ...], ...], labels: Collection[int], sizes: dict[int, int]) -> int | None:
    """The one dimension that is made of the given labels; -1 where none is, None where they lie elsewhere."""
    found = -1
    for i, dim in enumerate(layout):
        real = [a for a in dim if sizes[a] != 1]
        if not any(a in labels for a in real):
            continue
        if found >= 0 or not all(a in labels for a in real):
            return None
        found = i
    return found


def _real(dim: tuple[int, ...], roles: Roles) -> bool:
    return any(roles.entry_sizes[a] != 1 for a in dim)


def _others(layout: tuple[tuple[int, ...], ...], skip: int, roles: Roles) -> list[tuple[int, ...]]:
    sizes = {**roles.entry_sizes, **roles.exit_sizes}
    return [tuple(a for a in dim if sizes[a] != 1) for i, dim in enumerate(layout) if i != skip]
