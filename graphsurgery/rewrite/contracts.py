"""What a pass is and what it hands back.

A pass is a frozen dataclass whose fields are its options. It takes a captured graph, leaves it alone, and
returns a rewritten copy with one `Change` per rewrite and one `Refusal` per rewrite it decided against. What
a pass declares in `Pass.preserves` is checked by `graphsurgery.rewrite.manager.PassManager`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from graphsurgery.cost import Cost, op_name
from graphsurgery.errors import PassError
from graphsurgery.graph import module_path, source_line

__all__ = ["Change", "NodeRef", "Pass", "PassResult", "Preserves", "Refusal", "require_declared"]


@dataclass(frozen=True)
class NodeRef:
    """A node as a report names it; holds no reference to the graph.

    Attributes:
        name: Name of the node in its graph, e.g. `"conv2d_1"`.
        op: What it does, e.g. `"conv2d"`.
        module: Dotted path of the user's module it came from, `""` for the root.
        source: The user's source line, `"file.py:12, in forward: x = self.conv(x)"`, `""` where unknown.
    """

    name: str
    op: str
    module: str
    source: str

    @classmethod
    def of(cls, node: fx.Node) -> NodeRef:
        """Describe `node`."""
        return cls(node.name, op_name(node), module_path(node), source_line(node))


@dataclass(frozen=True)
class Change:
    """One rewrite that was made.

    Attributes:
        pass_name: Name of the pass that made it.
        kind: Stable code of the rewrite, e.g. `"conv+norm"`.
        before: The nodes that were replaced.
        after: The nodes that replaced them.
        parameters: Attribute names that were written or removed.
        cost_before: Cost of `before`, per sample.
        cost_after: Cost of `after`, per sample.
        residual: Relative residual of the certificate; None where the change needs none.
        detail: One sentence for a reader, may be empty.
    """

    pass_name: str
    kind: str
    before: tuple[NodeRef, ...]
    after: tuple[NodeRef, ...]
    parameters: tuple[str, ...]
    cost_before: Cost
    cost_after: Cost
    residual: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Refusal:
    """One rewrite that was considered and not made.

    Attributes:
        pass_name: Name of the pass that declined.
        code: Stable code of the reason, e.g. `"costs-more"`.
        nodes: The nodes it is about.
        reason: One sentence with the numbers.
        cost_before: Cost of the nodes as they are, per sample; None where cost was not the question.
        cost_after: Cost the rewrite would have had, per sample.
    """

    pass_name: str
    code: str
    nodes: tuple[NodeRef, ...]
    reason: str
    cost_before: Cost | None = None
    cost_after: Cost | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass hands back.

    Attributes:
        graph_module: The rewritten copy, or an unchanged graph when `changes` is empty.
        changes: Rewrites made, in order.
        refusals: Rewrites declined, in graph order.
    """

    graph_module: fx.GraphModule
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether anything was rewritten; the name is the one torch's own pass manager reads."""
        return bool(self.changes)


@dataclass(frozen=True)
class Preserves:
    """What a pass leaves as it was; the pass manager checks each.

    Attributes:
        signature: Placeholders (count, order) and the structure of the output.
        shapes: Shapes of all outputs.
        dtypes: Dtypes of all outputs.
        values: `"exact"` when every output is bit-equal in torch eager, `"rounding"` when it may differ by
            rounding.
    """

    signature: bool = True
    shapes: bool = True
    dtypes: bool = True
    values: Literal["exact", "rounding"] = "rounding"


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass: a frozen dataclass whose fields are its options.

    Class attributes:
        name: Unique name, as on the command line: `"fold-affine"`.
        summary: What it does, in one line.
        preserves: What it leaves as it was.
        default: Whether `graphsurgery.optimize` runs it when no passes are named.
        waits: Whether the pass manager runs it only once the passes before it change nothing any more.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    preserves: ClassVar[Preserves] = Preserves()
    default: ClassVar[bool] = True
    waits: ClassVar[bool] = False

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite a copy of `gm`.

        Args:
            gm: A captured graph. It must not be modified; tensors are shared, so no tensor may be written in
                place.

        Returns:
            The rewritten copy with its changes and refusals. Without changes the graph module may be `gm`
            itself.
        """

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run the pass; the form that `torch.fx.passes.infra.pass_manager.PassManager` calls."""
        return self.run(gm)


def require_declared(item: Pass) -> None:
    """Refuse a pass that does not say who it is and what it keeps.

    Raises:
        PassError: Its name is no text, or `preserves` is something else.
    """
    name, kept = getattr(item, "name", None), getattr(item, "preserves", None)
    if not isinstance(name, str) or not name:
        raise PassError(f"the pass {type(item).__name__} has the name {name!r}; expected a text")
    if not isinstance(kept, Preserves):
        raise PassError(f"pass {name!r} has preserves={kept!r}; expected a graphsurgery.Preserves")
