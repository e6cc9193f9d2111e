"""The job with plain Accelerate: a state every so many steps, and resume from the newest.

It follows https://huggingface.co/docs/accelerate/usage_guides/checkpoint and examples/by_feature/checkpointing.py of
its repository (`step_N` folders, the newest by time, skip_first_batches); the sbatch script in preemption.py follows
examples/slurm/submit_multinode.sh there. Neither handles signals.
"""

from __future__ import annotations

import os

import common
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Train, from the newest state if there is one."""
    accelerator = Accelerator(cpu=True)
    set_seed(common.SEED)
    model = common.network()
    optimizer = common.optimizer(model)
    loader = DataLoader(TensorDataset(*common.data()), batch_size=common.MICROBATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    done = 0
    states = common.DIRECTORY / "accelerate"
    states.mkdir(exist_ok=True)
    if folders := sorted(states.glob("step_*"), key=os.path.getctime):
        accelerator.load_state(str(folders[-1]))
        done = int(folders[-1].name.removeprefix("step_"))

    log = common.Log(accelerator.process_index, done)
    epoch, skip = divmod(done, len(loader))
    while done < common.STEPS:
        loader.set_epoch(epoch)
        for inputs, targets in accelerator.skip_first_batches(loader, skip) if skip else loader:
            common.compute(done + 1)
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            log.step(done)
            if done % common.SAVE_EVERY == 0:
                accelerator.save_state(str(states / f"step_{done}"))
            if done == common.STEPS:
                break
        epoch, skip = epoch + 1, 0
    common.finish(accelerator.unwrap_model(model), accelerator.process_index)
    accelerator.end_training()


if __name__ == "__main__":
    main()
