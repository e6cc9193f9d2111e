"""A recipe whose first step never ends."""

import time

import torch

import launcher


def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(2, 1))
    run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in run.steps(total=3):
        print("stuck now", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    launcher.main(train)
