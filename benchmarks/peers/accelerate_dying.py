"""A plain Accelerate script that dies in step 2 in the way that DEATH names."""

import torch
from accelerate import Accelerator
from deaths import die
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    accelerator = Accelerator()
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rows = DataLoader(TensorDataset(torch.randn(64, 3)), batch_size=2)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    for index, (row,) in enumerate(rows):
        if index == 2:
            die(accelerator.process_index)
        accelerator.backward(model(row).square().mean())
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
