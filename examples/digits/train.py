"""Train the digits network (about a minute on two cores) and store its weights beside this file."""

from __future__ import annotations

import time

import torch
from data import load_split
from network import WEIGHTS, DigitNet
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

EPOCHS = 40
BATCH = 64


def shift(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Move the whole batch by up to one pixel each way, zeros coming in; (n, 1, 8, 8) either way."""
    top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(pictures, (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]


@torch.no_grad()
def accuracy(model: torch.nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, from 0 to 1."""
    return (model(pictures).argmax(1) == labels).double().mean().item()


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (pictures, labels), test = load_split()
    model = DigitNet()
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(labels), generator=generator)
        for index in order[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(
                model(shift(pictures[index], generator)), labels[index], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1:2d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
    model.eval()
    print(f"accuracy on the {len(test[1])} test pictures: {accuracy(model, *test):.2%}")
    # num_batches_tracked and the like stay in: the file holds exactly what state_dict() holds.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    print(f"stored {WEIGHTS.name}, {WEIGHTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
