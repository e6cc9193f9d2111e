"""The same as a recipe."""

import torch
from deaths import die

import launcher


def train(run: launcher.Run) -> None:
    rows = run.loader((torch.randn(64, 3),), batch_size=8, microbatch_size=2)
    model = run.build(lambda: torch.nn.Linear(3, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
    for step in run.steps(rows, total=8):
        if step.index == 2:
            die(run.rank)
        for (row,) in step:
            step.backward(model(row).square().sum())
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
