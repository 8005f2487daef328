"""Fingerprints of graphs and tensors, cheap enough to be taken around every pass.

`graphsurgery.graph.structural_hash` hashes every parameter byte, at about 0.3 GB/s. The pass manager asks one
question only, "is this still the same?", around every pass, also about tensors that were written behind
torch's back (through `.data` or numpy, which no version counter sees). So it reads the contents too, but as
sums of machine words over the rows and columns of a table, which runs near the speed of memory. Sums can
collide for contents made to collide; where two tensors are to be merged, `same_bits` decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["fingerprint", "held_tensors", "same_bits", "tensor_digest", "tensor_digests"]

_ROW = 1024


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Digest of shape, dtype and contents of a dense tensor.

    Args:
        tensor: Any dense tensor, of any dtype, on any device.
    """
    flat = _bytes(tensor)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    rows = words.numel() // _ROW * _ROW
    table = words[:rows].view(-1, _ROW)
    digest = hashlib.blake2b(
        repr((tuple(tensor.shape), tensor.dtype, tensor.device.type)).encode(), digest_size=16
    )
    for part in (table.sum(0), table.sum(1), words[rows:], flat[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.digest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape, dtype, device and the same bits (NaN equals NaN, 0.0 not -0.0)."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(_bytes(a), _bytes(b))


def tensor_digests(gm: fx.GraphModule, known: Mapping[int, bytes] | None = None) -> dict[int, bytes]:
    """Digest of every parameter, buffer and constant that `gm` holds, by `id` of the tensor.

    Args:
        gm: The graph module.
        known: Digests that were just taken of tensors `gm` may share; they are not taken again.
    """
    known = known or {}
    return {id(t): known.get(id(t)) or tensor_digest(t) for _, t in held_tensors(gm)}


def fingerprint(gm: fx.GraphModule, digests: Mapping[int, bytes]) -> str:
    """Hash of a graph and what it holds: signature, targets, arguments, wiring, names, contents of tensors.

    Node names and `node.meta` are left out.

    Args:
        gm: The graph module.
        digests: What `tensor_digests(gm)` gave.
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
        digest.update(f"{name}|{kind}|{tensor.requires_grad}|".encode() + digests[id(tensor)])
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


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


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
