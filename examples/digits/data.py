"""scikit-learn's bundled handwritten digits, split once and for all."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TEST_SIZE = 500


def load_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ``(train, test)``, each ``(pictures, labels)``.

    Pictures are (n, 1, 8, 8) float32 from 0 to 16, labels (n,) int64. The split is a seeded
    permutation: 1,297 pictures to train on, 500 that training never sees.
    """
    bunch = load_digits()
    pictures = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    return (pictures[train], labels[train]), (pictures[test], labels[test])
