"""The recipe's model in Hugging Face's Trainer, with its log; without checkpoints, which is in its favour."""

from __future__ import annotations

import gpt_common
import torch
import transformers


class Trainer(transformers.Trainer):
    """The Trainer with a DataLoader that reads a micro-batch in one slice."""

    def get_train_dataloader(self):
        """Rows, a micro-batch at a time."""
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=gpt_common.as_is,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


def main() -> None:
    job = gpt_common.start()
    cfg, cuda = job.cfg, job.device.type == "cuda"
    model = gpt_common.Scored(job.model())
    optimizer = job.optimizer(model)
    options = transformers.TrainingArguments(
        output_dir=str(job.directory / "trainer"),
        use_cpu=not cuda,
        bf16=job.settings.precision == "bf16",
        torch_compile=job.compiled,
        max_steps=gpt_common.FOREVER,
        per_device_train_batch_size=cfg.microbatch_size,
        gradient_accumulation_steps=job.accumulate,
        max_grad_norm=cfg.clip,
        logging_steps=gpt_common.LOG_EVERY,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Trainer(model, options, train_dataset=gpt_common.Rows(job.rows()), optimizers=(optimizer, schedule)).train()


if __name__ == "__main__":
    main()
