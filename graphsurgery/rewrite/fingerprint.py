"""Fingerprints of graphs and tensors, cheap enough to be taken around every pass.

`graphsurgery.graph.structural_hash` hashes every parameter byte, at about 0.3 GB/s. The pass manager asks one
question only, "is this still the same?", and asks it around every pass. So contents enter as the sums of
`graphsurgery.digest`, once per tensor; where two tensors are to be merged, `same_bits` decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphsurgery.digest import tensor_digest
from graphsurgery.graph import tensor_bytes

__all__ = ["Ledger", "fingerprint", "held_tensors", "same_bits", "tensor_digest"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype, device and the same bits (NaN equals NaN, 0.0 not -0.0)."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(tensor_bytes(a), tensor_bytes(b))


class Ledger:
    """Digests of tensors, each taken when the tensor is first seen; tells which have been written since.

    A write through torch bumps the tensor's version, which costs nothing to ask for; a write behind torch's
    back (`.data`, numpy) shows only when the contents are read again.
    """

    def __init__(self) -> None:
        self._seen: dict[
            int, tuple[torch.Tensor, int, bytes]
        ] = {}  # holds the tensors, so that ids stay theirs

    def digest(self, tensor: torch.Tensor) -> bytes:
        """Digest of `tensor` as it was first seen."""
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = (tensor, _version(tensor), tensor_digest(tensor))
        return self._seen[id(tensor)][2]

    def keep(self, graphs: Iterable[fx.GraphModule]) -> None:
        """Let go of all tensors that none of these graphs holds: those of runs that were thrown away."""
        held = {id(tensor) for gm in graphs for _, tensor in held_tensors(gm)}
        self._seen = {key: seen for key, seen in self._seen.items() if key in held}

    def written(self, *, contents: bool) -> frozenset[int]:
        """`id` of every tensor that no longer holds what it held.

        Args:
            contents: Read all of them again; else only those that say they were written.
        """
        return frozenset(
            key
            for key, (tensor, version, digest) in self._seen.items()
            if (contents or version != _version(tensor)) and tensor_digest(tensor) != digest
        )


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def fingerprint(gm: fx.GraphModule, digest_of: Callable[[torch.Tensor], bytes] = tensor_digest) -> str:
    """Hash of a graph and what it holds: signature, targets, arguments, wiring, names, contents of tensors.

    Node names and `node.meta` are left out.

    Args:
        gm: The graph module.
        digest_of: Digest of a tensor, as `Ledger.digest`.
    """
    digest = hashlib.blake2b(digest_size=16)
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        target = _target(node)
        digest.update(f"{node.op}|{target}|{_text(node.args, index)}|{_text(node.kwargs, index)}\n".encode())
    codegen = gm.graph._codegen
    digest.update(f"{type(codegen).__name__}|{getattr(codegen, 'pytree_info', None)}\n".encode())
    for name, tensor in sorted(held_tensors(gm), key=lambda item: item[0]):
        kind = type(tensor).__name__
        digest.update(f"{name}|{kind}|{tensor.requires_grad}|".encode() + digest_of(tensor))
    return digest.hexdigest()


def held_tensors(gm: fx.GraphModule) -> Iterable[tuple[str, torch.Tensor]]:
    """Name and value of parameters, buffers, and of plain tensor attributes that a get_attr node reads."""
    found: dict[str, torch.Tensor] = dict(gm.named_parameters(remove_duplicate=False))
    found.update(gm.named_buffers(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, torch.Tensor):
                found[str(node.target)] = value
    return found.items()


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _text(value: Any, index: Mapping[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{index.get(value, -1)}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item, index) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(item, index)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return "slice" + _text((value.start, value.stop, value.step), index)
    return repr(value)
