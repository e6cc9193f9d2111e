"""The job with Lightning's Trainer: on SIGUSR1 it saves and requeues by itself.

It follows https://lightning.ai/docs/pytorch/stable/clouds/cluster_advanced.html (the sbatch script with
`--signal=SIGUSR1@90`, here in preemption.py; SLURMEnvironment's auto-requeue, which is on by default),
https://lightning.ai/docs/pytorch/stable/common/checkpointing_intermediate.html (ModelCheckpoint every n steps) and
https://lightning.ai/docs/pytorch/stable/common/trainer.html#fit (`ckpt_path="last"`). The data loader is torchdata's
StatefulDataLoader: "make your dataloader resumable", says the Trainer when it resumes in the middle of an epoch.
"""

from __future__ import annotations

import os
from typing import Any

import common
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Module(L.LightningModule):
    """The model, as Lightning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = common.network()
        self.log_file: common.Log | None = None

    def on_train_start(self) -> None:
        """A resumed run has its global step by now."""
        self.log_file = common.Log(self.global_rank, self.global_step)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """One forward pass."""
        inputs, targets = batch
        common.compute(self.global_step + 1)
        return torch.nn.functional.mse_loss(self.network(inputs), targets)

    def on_train_batch_end(self, *_: Any) -> None:
        """The optimizer has stepped."""
        assert self.log_file is not None
        self.log_file.step(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same as everybody's."""
        return common.optimizer(self.network)


def main() -> None:
    """Train, from what is there if something is."""
    L.seed_everything(common.SEED)
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    dataset = TensorDataset(*common.data())
    sampler = DistributedSampler(dataset, world_size, rank, seed=common.SEED)
    loader = StatefulDataLoader(dataset, batch_size=common.MICROBATCH, sampler=sampler)
    root = common.DIRECTORY / "lightning"
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        num_nodes=world_size,
        devices=1,
        max_steps=common.STEPS,
        default_root_dir=root,
        callbacks=[ModelCheckpoint(root / "checkpoints", every_n_train_steps=common.SAVE_EVERY, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # None takes what the signal handler has saved (hpc_ckpt_N), "last" what ModelCheckpoint has; neither looks at both
    signalled = any(root.glob("hpc_ckpt_*.ckpt"))
    module = Module()
    trainer.fit(module, loader, ckpt_path=None if signalled else "last")
    if trainer.global_step == common.STEPS:
        common.finish(module.network, rank)


if __name__ == "__main__":
    main()
