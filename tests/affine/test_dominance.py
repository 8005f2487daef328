"""Post-dominators against what they mean: without p, no path leads from n to the output."""

from __future__ import annotations

import operator
import random

import pytest
from torch import fx

from graphsurgery.affine.dominance import PostDominators


def random_graph(seed: int, size: int) -> tuple[fx.Graph, set[fx.Node]]:
    """A graph of sums with dead ends, several outputs and some constant nodes."""
    rng = random.Random(seed)
    graph = fx.Graph()
    live = [graph.placeholder(f"x{i}") for i in range(rng.randint(1, 2))]
    constant = [graph.get_attr("weight", type_expr=None)]
    near = rng.random() < 0.5  # a deep graph, or a wide one
    for _ in range(size):
        if rng.random() < 0.1:
            constant.append(graph.call_function(operator.neg, (rng.choice(constant),)))
            continue
        pool = live[-4:] if near else live
        operands = [rng.choice(pool) for _ in range(rng.choice([1, 1, 2, 3]))]
        if rng.random() < 0.2:
            operands.append(rng.choice(constant))
        live.append(graph.call_function(sum, (tuple(operands),)))
    graph.output(tuple(rng.sample(live, min(len(live), rng.choice([1, 1, 2, 3])))))
    return graph, set(constant)


def leads_out(node: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether a path leads from a node to the output that does not touch another."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current is without:
            continue
        if current.op == "output":
            return True
        new = [user for user in current.users if user not in seen]
        seen.update(new)
        stack.extend(new)
    return False


@pytest.mark.parametrize("size", [1, 4, 12, 40])
def test_dies_with_is_what_every_path_runs_through(size: int) -> None:
    counted = {True: 0, False: 0}
    for seed in range(60 if size < 40 else 15):
        graph, constant = random_graph(seed, size)
        tree = PostDominators(graph, constant)
        nodes = [node for node in graph.nodes if node not in constant]
        alive = {node for node in nodes if leads_out(node)}
        assert set(tree.parent) == alive
        for node in nodes:
            for other in nodes:
                expected = node in alive and other in alive and not leads_out(node, without=other)
                assert tree.dies_with(node, other) is expected, (seed, node, other)
                counted[expected] += node is not other
    assert min(counted.values()) > 60, "graphs that tell nothing"


def test_the_parent_is_the_nearest_of_them() -> None:
    for seed in range(60):
        graph, constant = random_graph(seed, 15)
        tree = PostDominators(graph, constant)
        for node, parent in tree.parent.items():
            if parent is None:
                assert node.op == "output"
                continue
            above = [other for other in tree.parent if other is not node and tree.dies_with(node, other)]
            assert parent in above
            assert all(tree.dies_with(parent, other) for other in above), (seed, node)


def test_readers_are_live_and_each_is_named_once() -> None:
    for seed in range(60):
        graph, constant = random_graph(seed, 15)
        tree = PostDominators(graph, constant)
        for node, readers in tree.readers.items():
            assert len(readers) == len(set(readers))
            assert set(readers) == {user for user in node.users if user in tree.parent}


def test_a_chain_of_many_is_one_path() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(3000):
        nodes.append(graph.call_function(operator.neg, (nodes[-1],)))
    graph.output(nodes[-1])
    tree = PostDominators(graph, ())
    rng = random.Random(0)
    for _ in range(2000):
        i, j = rng.randrange(len(nodes)), rng.randrange(len(nodes))
        assert tree.dies_with(nodes[i], nodes[j]) is (i <= j)


def test_a_diamond_ends_where_its_paths_meet() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    left, right = graph.call_function(operator.neg, (x,)), graph.call_function(operator.pos, (x,))
    met = graph.call_function(operator.add, (left, right))
    dead = graph.call_function(operator.neg, (left,))
    graph.output(met)
    tree = PostDominators(graph, ())
    assert tree.parent[x] is tree.parent[left] is tree.parent[right] is met
    assert dead not in tree.parent
    assert tree.readers[left] == [met]
    assert not tree.dies_with(x, left)
    assert not tree.dies_with(dead, met)
    assert not tree.dies_with(met, x)
