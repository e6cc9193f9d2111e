"""launcher.linear_cross_entropy: the loss of whole logits, and their gradients, without them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import launcher
from launcher import losses
from launcher.losses import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 8, 50
# torch makes an instance of the function itself when it traces one
COMPILES = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[[3, 20, 36]] = -100
    return hidden, weight, targets


def whole(hidden, weight, targets, z_loss=0.0):
    logits = F.linear(hidden, weight)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    drift = scores.logsumexp(-1)[targets != -100].square().sum()
    return F.cross_entropy(scores, targets, reduction="sum") + z_loss * drift


def gradients(loss, *of):
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("chunk", [1, 10, 37, 4096])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_whole_logits(chunk, z_loss):
    hidden, weight, targets = inputs(torch.float64)
    ours = linear_cross_entropy(hidden, weight, targets, chunk=chunk, z_loss=z_loss)
    theirs = whole(hidden, weight, targets, z_loss)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(gradients(2.5 * ours, hidden, weight), gradients(2.5 * theirs, hidden, weight), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_small_differences():
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *of: linear_cross_entropy(*of, targets[:9], chunk=4, z_loss=0.1), (hidden[:9], weight)
    )


def test_rows_another_ignored_class_and_one_input_that_trains():
    hidden, weight, targets = inputs()
    rows = targets.clamp(0)[:36].reshape(4, 9)
    loss = linear_cross_entropy(hidden[:36].reshape(4, 9, WIDTH), weight.detach(), rows, chunk=8, ignore_index=0)
    expected = F.cross_entropy(F.linear(hidden[:36], weight), rows.flatten(), reduction="sum", ignore_index=0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*gradients(loss, hidden), *gradients(expected, hidden))
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).item() == 0
    with pytest.raises(ValueError, match="3 targets for 37 hidden states"):
        linear_cross_entropy(hidden, weight, targets[:3])


def test_a_graph_that_is_kept_goes_back_twice():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(one.equal(other) for one, other in zip(first, gradients(loss, hidden, weight), strict=True))


def test_a_tied_matrix_gets_both_gradients():
    _, weight, targets = inputs(torch.float64)
    tokens = torch.arange(TOKENS)
    (ours,) = gradients(linear_cross_entropy(F.embedding(tokens, weight), weight, targets, chunk=16), weight)
    (theirs,) = gradients(whole(F.embedding(tokens, weight), weight, targets), weight)
    torch.testing.assert_close(ours, theirs)


def test_under_autocast_products_are_bf16_and_all_else_fp32():
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear_cross_entropy(hidden, weight, targets, chunk=16), whole(hidden, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)  # the same logits, in bf16
    pairs = zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True)
    for one, other in pairs:
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_half_precision_weights_as_fsdp_gathers_them():
    hidden, weight, targets = (one.detach() for one in inputs())
    hidden, weight = (one.bfloat16().requires_grad_() for one in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert loss.dtype == torch.float32
    ours = gradients(loss, hidden, weight)
    exact = gradients(whole(hidden.double(), weight.double(), targets), hidden, weight)
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.01 * other.norm()


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made in here holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_the_logits_never_exist_whole():
    hidden = torch.randn(512, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    targets = torch.randint(0, 1000, (512,))
    sizes = {}
    for chunk in (64, 512):
        with Largest() as largest:
            linear_cross_entropy(hidden, weight, targets, chunk=chunk).backward()
        sizes[chunk] = largest.numbers
    assert sizes == {64: 64 * 1000, 512: 512 * 1000}


def test_without_gradients_none_are_computed():
    hidden, weight, targets = inputs()
    with torch.no_grad(), Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole(hidden, weight, targets).detach())
    assert largest.numbers == 400  # a sum of the weight's gradients would be as large: see the next line
    assert VOCABULARY * WIDTH == 400


@COMPILES
def test_it_compiles_into_one_graph_and_by_the_chunk(monkeypatch):
    hidden, weight, targets = inputs()
    work = torch.compile(losses._chunk, backend="aot_eager", fullgraph=True)  # inductor takes ten seconds
    monkeypatch.setattr(losses, "_compiled", lambda: work)

    def doubled(hidden, weight):
        return 2 * linear_cross_entropy(hidden, weight, targets, chunk=20)

    expected = doubled(hidden, weight)
    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")(hidden, weight)
    chunks = 2 * linear_cross_entropy(hidden, weight, targets, chunk=37, compile=True)
    for loss in (compiled, chunks):
        torch.testing.assert_close(loss, expected)
        pairs = zip(
            gradients(loss, hidden, weight), torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
            strict=True,
        )  # fmt: skip
        for one, other in pairs:
            torch.testing.assert_close(one, other)


def test_it_is_public():
    assert launcher.linear_cross_entropy is linear_cross_entropy


def test_small_gradients_do_not_vanish_in_fp16():
    """A gradient scaler comes too late for what is computed in the forward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=generator)
    weight = torch.randn(60_000, 16, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        launcher.linear_cross_entropy(hidden, weight, torch.arange(8), chunk=4).backward()
    exact, *_ = torch.autograd.grad(whole(hidden, weight, torch.arange(8)), weight)
    assert (weight.grad - exact).norm() < 0.02 * exact.norm()
    assert int((weight.grad == 0).all(1).sum()) == 0
