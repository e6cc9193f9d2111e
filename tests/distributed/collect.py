"""A recipe that checks gathering with gradients against the same computation on one process."""

import torch

import launcher


def train(run: launcher.Run) -> None:
    rows = [torch.randn(rank + 2, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(run.world_size)]
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    gathered = run.all_gather(rows[run.rank] * weight)
    whole = torch.cat(rows) * weight.detach()
    torch.testing.assert_close(gathered.detach(), whole)
    similarity = (gathered @ gathered.T).logsumexp(0)  # every row meets every other, as in a contrastive loss
    start = sum(len(part) for part in rows[: run.rank])
    similarity[start : start + len(rows[run.rank])].sum().backward()

    reference = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    everything = torch.cat(rows) * reference
    (everything @ everything.T).logsumexp(0).sum().backward()
    [*totals] = run.world.sum(*weight.grad.tolist())
    torch.testing.assert_close(torch.tensor(totals), reference.grad, check_dtype=False)
    assert run.mean(float(run.rank)).item() == (run.world_size - 1) / 2


if __name__ == "__main__":
    launcher.main(train)
