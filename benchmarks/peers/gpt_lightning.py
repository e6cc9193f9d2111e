"""The recipe's model in Lightning's Trainer, with its log; without checkpoints, which is in its favour."""

from __future__ import annotations

import gpt_common
import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger


class Module(lightning.LightningModule):
    """The recipe's model and optimizer."""

    def __init__(self, job: gpt_common.Job) -> None:
        super().__init__()
        self.job, self.scored = job, gpt_common.Scored(job.model())
        if job.compiled:
            self.scored.compile()

    def training_step(self, batch, _):
        """The mean loss of a micro-batch."""
        loss = self.scored(batch["tokens"])["loss"]
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        """By torch itself: in bf16 Lightning refuses to clip for a fused optimizer, as if there were a scaler."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self):
        """The recipe's."""
        return self.job.optimizer(self)


def main() -> None:
    job = gpt_common.start()
    cfg, cuda = job.cfg, job.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        gpt_common.Rows(job.rows()),
        batch_size=cfg.microbatch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=gpt_common.as_is,
        pin_memory=cuda,
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if job.settings.precision == "bf16" else "32-true",
        max_steps=gpt_common.FOREVER,
        accumulate_grad_batches=job.accumulate,
        gradient_clip_val=cfg.clip,
        log_every_n_steps=gpt_common.LOG_EVERY,
        logger=CSVLogger(job.directory),
        callbacks=[TQDMProgressBar(refresh_rate=gpt_common.LOG_EVERY)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(job), loader)


if __name__ == "__main__":
    main()
