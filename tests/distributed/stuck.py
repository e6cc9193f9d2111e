"""A recipe whose second step never ends."""

import time

import torch

import launcher


def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(2, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps(total=3):
        if step.index:
            print("stuck now", flush=True)
            time.sleep(600)
        step.backward(model(torch.ones(1, 2)).sum(), 1)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
