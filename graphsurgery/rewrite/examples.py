"""The example inputs, which a captured graph and every comparison share: a pass is not to write into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsurgery.errors import PassError
from graphsurgery.graph import INFO_KEY, CaptureInfo
from graphsurgery.rewrite.fingerprint import same_bits

__all__ = ["ExampleGuard"]


class ExampleGuard:
    """Holds copies of the example inputs, and puts them back.

    A pass that made them tiny and a weight wrong would else pass every comparison on them.

    Args:
        gm: A captured graph, or any other.
        inputs: Inputs that comparisons are made on besides; None for none.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Any) -> None:
        infos = [info for info in (gm.meta.get(INFO_KEY), inputs) if isinstance(info, CaptureInfo)]
        leaves = pytree.tree_leaves([(info.args, dict(info.kwargs)) for info in infos])
        if not isinstance(inputs, CaptureInfo):
            leaves += pytree.tree_leaves(inputs)
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
        self._pairs = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def restore(self) -> bool:
        """Put back what was written; return whether anything was.

        Raises:
            PassError: What was written cannot be put back.
        """
        written = [(tensor, copy) for tensor, copy in self._pairs if not same_bits(tensor, copy)]
        for tensor, copy in written:
            try:
                tensor.detach().copy_(copy)
            except RuntimeError as error:  # resized, or several elements in one place
                raise PassError(
                    f"a pass wrote into the example inputs, and they cannot be put back ({error}): "
                    "expected a pass that leaves them; make them anew and leave the pass out"
                ) from error
        return bool(written)
