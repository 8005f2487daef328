"""`--option PASS.KEY=VALUE`: read by the types of a pass's fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from torch import fx

from graphsurgery.cli.errors import UsageError
from graphsurgery.cli.options import with_options
from graphsurgery.errors import PassError
from graphsurgery.passes import Conv1x1ToLinear, FoldAffine, FullyConvolutional, LinearToConv1x1
from graphsurgery.rewrite import Pass, PassResult


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with an option of every type."""

    count: int = 1
    share: float | None = 0.5
    word: str = "a"
    many: tuple[int, ...] = ()
    name: ClassVar[str] = "sample"

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Nothing."""
        return PassResult(gm)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sample.count=3", Sample(count=3)),
        ("sample.share=0.25", Sample(share=0.25)),
        ("sample.share=none", Sample(share=None)),
        ("sample.word=b=c", Sample(word="b=c")),
        ("sample.many=1, 2,3", Sample(many=(1, 2, 3))),
        ("sample.many=", Sample(many=())),
        ("linear-to-conv1x1.layout=channels-last", LinearToConv1x1(layout="channels-last")),
        ("linear-to-conv1x1.only=blocks.*.fc1,head", LinearToConv1x1(only=("blocks.*.fc1", "head"))),
        ("linear-to-conv1x1.only=swapped", LinearToConv1x1(only="swapped")),
        ("conv1x1-to-linear.patches=true", Conv1x1ToLinear(patches=True)),
        ("fully-convolutional.scores=mean", FullyConvolutional(scores="mean")),
    ],
)
def test_reads_values_by_the_type_of_the_field(text: str, expected: Pass) -> None:
    passes = (Sample(), LinearToConv1x1(), Conv1x1ToLinear(), FullyConvolutional())
    wanted = tuple(expected if item.name == expected.name else item for item in passes)
    assert with_options(passes, (text,)) == wanted


def test_several_options_of_one_pass() -> None:
    found = with_options((Sample(),), ("sample.count=3", "sample.word=b"))
    assert found == (replace(Sample(), count=3, word="b"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=3", "is not PASS.KEY=VALUE"),
        ("sample.count", "is not PASS.KEY=VALUE"),
        ("smple.count=3", "no pass 'smple' runs; did you mean 'sample'?; those that do: sample, fully"),
        ("sample.cont=3", "sample has no option 'cont'; did you mean 'count'?; it has: count, share"),
        ("sample.name=other", "sample has no option 'name'"),
        ("sample.count=many", "expected a whole number, got 'many'"),
        ("sample.many=1,x", "expected a whole number, parted by commas, got '1,x'"),
        ("fully-convolutional.scores=maps", "expected 'map' or 'mean', got 'maps'"),
    ],
)
def test_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        with_options((Sample(), FullyConvolutional()), (text,))


def test_the_pass_has_the_last_word() -> None:
    with pytest.raises((PassError, ValueError)):
        with_options((FoldAffine(),), ("fold-affine.cost=no such model",))
