"""The recipe's model in a loop written by hand, nanoGPT's way: the measure for all others.

Compiled whole, fused AdamW, autocast, the next rows read and copied while the GPU works; no log, no save, no resume.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import gpt_common
import numpy as np
import torch


def main() -> None:
    job = gpt_common.start()
    cfg, cuda = job.cfg, job.device.type == "cuda"
    rows, generator = job.rows(), np.random.default_rng(0)

    def batch() -> torch.Tensor:
        index = generator.integers(len(rows), size=cfg.microbatch_size)
        tokens = torch.from_numpy(rows[index].astype(np.int64))
        return tokens.pin_memory().to(job.device, non_blocking=True) if cuda else tokens

    model = job.model().to(job.device)
    compute = torch.compile(model) if job.compiled else model
    precise = torch.autocast(job.device.type, torch.bfloat16) if job.settings.precision == "bf16" else nullcontext()
    optimizer = job.optimizer(model)
    count = cfg.batch_size * cfg.data.seq_len
    tokens = batch()
    for step in range(gpt_common.FOREVER):
        rate = cfg.lr * min(1.0, (step + 1) / cfg.warmup) * 0.5 * (1 + math.cos(math.pi * step / gpt_common.FOREVER))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(job.accumulate):
            with precise:
                loss = compute(tokens[:, :-1], tokens[:, 1:]) / count
            tokens = batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
