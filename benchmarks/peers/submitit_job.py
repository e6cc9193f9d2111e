"""The job with submitit: its checkpoint() is called by the signal, and requeues.

It follows https://github.com/facebookincubator/submitit/blob/main/docs/checkpointing.md (the callable with
`checkpoint`, "dump it properly", DelayedSubmission of a new instance) and docs/examples/torch_distributed.py there
(TorchDistributedEnvironment). submitit leaves what is saved, and when, to the user: here a file every SAVE_EVERY steps,
as for the others, and one more in `checkpoint`, both renamed into place.

    submitit_job.py --partition P --time MINUTES --signal-delay SECONDS
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import common
import submitit
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Training:
    """What is pickled, submitted and submitted again."""

    def __init__(self) -> None:
        self.model = self.optimizer = None
        self.done = 0

    def __call__(self, path: str) -> None:
        """Train, from the file if there is one."""
        place = submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        dist.init_process_group("gloo")
        self.model = common.network()
        self.optimizer = common.optimizer(self.model)
        if Path(path).exists():
            state = torch.load(path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done = state["done"]
        model = DistributedDataParallel(self.model)
        inputs, targets = common.data()
        epoch_steps = common.SAMPLES // (common.MICROBATCH * place.world_size)
        log = common.Log(place.rank, self.done)
        for step in range(self.done, common.STEPS):
            epoch, position = divmod(step, epoch_steps)
            order = torch.randperm(common.SAMPLES, generator=torch.Generator().manual_seed(epoch))
            mine = order[position * place.world_size + place.rank :: epoch_steps * place.world_size]
            common.compute(step + 1)
            loss = torch.nn.functional.mse_loss(model(inputs[mine]), targets[mine])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.done = step + 1
            log.step(self.done)
            if self.done % common.SAVE_EVERY == 0 and place.rank == 0:
                self.save(path)
        common.finish(self.model, place.rank)
        dist.destroy_process_group()

    def save(self, path: str) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}
        torch.save(state, path + ".partial")
        os.replace(path + ".partial", path)

    def checkpoint(self, path: str) -> submitit.helpers.DelayedSubmission:
        """Called in rank 0's signal handler: at preemption (where the site says so) and before the time limit."""
        if self.model is not None:
            self.save(path)
        return submitit.helpers.DelayedSubmission(Training(), path)


def main() -> None:
    """Submit it, and print the job's number."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--partition", required=True)
    parser.add_argument("--time", type=int, required=True)
    parser.add_argument("--signal-delay", type=int, default=90)
    options = parser.parse_args()
    executor = submitit.AutoExecutor(folder=common.DIRECTORY / "submitit", cluster="slurm", slurm_max_num_timeout=3)
    executor.update_parameters(
        nodes=2,
        tasks_per_node=1,
        cpus_per_task=1,
        timeout_min=options.time,
        slurm_partition=options.partition,
        slurm_signal_delay_s=options.signal_delay,
        slurm_additional_parameters={"requeue": True},
    )
    from submitit_job import Training as Importable  # "must be defined in an importable module": not in __main__

    print(executor.submit(Importable(), str(common.DIRECTORY / "checkpoint.pt")).job_id)


if __name__ == "__main__":
    main()
