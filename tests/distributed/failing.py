"""A recipe whose rank 1 fails in step 2 in the way that FAIL names."""

import os
import signal

import torch

import launcher


def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(3, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loader = run.loader((torch.ones(40, 3),), batch_size=4, microbatch_size=2)
    for step in run.steps(loader, total=5):
        if step.index == 2 and run.rank == 1:
            if os.environ["FAIL"] == "raise":
                raise ValueError("the recipe's own")
            if os.environ["FAIL"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        part = model.module if os.environ["FAIL"] == "part" else model
        for (x,) in step:
            step.backward(part(x).sum())
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
