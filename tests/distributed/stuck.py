"""A recipe whose second step never ends."""

import time

import torch

import launcher


def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(2, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    rows = run.loader((torch.ones(4, 2),), batch_size=2)
    for step in run.steps(rows, total=3):
        if step.index:
            print("stuck now", flush=True)
            time.sleep(600)
        for (x,) in step:
            step.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
