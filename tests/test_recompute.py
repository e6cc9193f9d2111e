"""--run.activation-checkpointing: what each mode keeps, computes again, and leaves as it is."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.autograd_cache import _collect_context_fn_hashes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from launcher.parallel import ATTENTION, _keep_dear, _recompute
from recipes import gpt

MODES = ("off", "full", "selective")
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Kept(TorchDispatchMode):
    """The storages made in here, by size: those that live on are what a backward pass was promised."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def model(mode, **changes):
    torch.manual_seed(0)
    made = gpt.GPT(gpt.ModelConfig(depth=2, width=64, **changes), vocab_size=64, seq_len=64)
    for block in made.blocks if mode != "off" else ():
        _recompute(block, keep_dear=mode == "selective")
    return made


ROWS = torch.randint(0, 64, (4, 65), generator=torch.Generator().manual_seed(1))


def work(mode, **changes):
    """What a forward and backward keep in bytes, compute in FLOPs, and come to."""
    made = model(mode, **changes)
    with FlopCounterMode(display=False) as flops:
        with Kept() as kept:
            loss = made(ROWS[:, :-1], ROWS[:, 1:])
        held = kept.bytes()
        loss.backward()
    return held, flops.get_total_flops(), loss.item(), gradients(made)


def gradients(made):
    return {name: parameter.grad for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_selective_keeps_less_than_off_and_computes_less_than_full(mlp):
    found = {mode: work(mode, mlp=mlp, dropout=0.1) for mode in MODES}
    kept, flops = ({mode: found[mode][k] for mode in MODES} for k in (0, 1))
    assert kept["full"] < kept["selective"] < 0.75 * kept["off"], kept
    assert flops["off"] < flops["selective"] < flops["full"], flops
    again = {mode: flops[mode] - flops["off"] for mode in MODES}
    assert again["selective"] < 0.55 * again["full"], again


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_gradients_are_those_of_a_plain_block_with_dropout(mode, attention):
    changes = {"attention": attention, "dropout": 0.1 if attention == "sdpa" else 0.0}
    plain, recomputed = work("off", **changes), work(mode, **changes)
    assert plain[2] == recomputed[2]
    assert all(recomputed[3][name].equal(gradient) for name, gradient in plain[3].items())


def compiled(mode):
    """Of a block's two graphs: the matrix products, and the bytes that the first hands to the second; the gradients."""
    products, handed = [], []

    def look(graph, inputs):
        products.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
        values = [node.meta["val"] for node in graph.graph.output_node().args[0] if node is not None]
        sized = [value for value in values if all(isinstance(size, int) for size in value.shape)]  # no RNG state
        handed.append(sum(value.nbytes for value in sized))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    made = model(mode)
    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    for block in made.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    made(ROWS[:, :-1], ROWS[:, 1:]).backward()
    return products, handed[0], gradients(made)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_recomputes_as_much_and_its_graph_has_no_break():
    (off, full, selective) = (compiled(mode) for mode in MODES)
    assert [one[0] for one in (off, full, selective)] == [[5, 10], [5, 14], [5, 12]]
    assert full[1] < selective[1] < 0.8 * off[1]
    for other in (full, selective):
        torch.testing.assert_close(other[2], off[2])


def test_a_copy_of_a_block_computes_with_its_own_weights():
    block = nn.Linear(3, 3)
    _recompute(block, keep_dear=False)
    other = copy.deepcopy(block)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    assert other(torch.ones(3)).tolist() == [0, 0, 0]
    assert block(torch.ones(3)).tolist() != [0, 0, 0]


def test_a_forward_that_is_no_method_is_recomputed_too():
    block = nn.Linear(3, 3)
    block.forward = torch.sin
    _recompute(block, keep_dear=False)
    x = torch.ones(3, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.equal(torch.ones(3).cos())


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_draws_is_not_kept(name):
    """It would not be run again, and what draws after it would then draw something else."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    place = [argument.name for argument in operator._schema.arguments].index("dropout_p")
    context, _ = _keep_dear()
    for dropout, kept in ((0.0, True), (0.1, False)):
        args = [None] * place + [dropout]
        for said in (context.policy_fn(None, operator, *args), context.policy_fn(None, operator, dropout_p=dropout)):
            assert (said == CheckpointPolicy.MUST_SAVE) == kept
    assert context.policy_fn(None, operator) == CheckpointPolicy.MUST_SAVE


def test_a_graph_of_a_selective_block_may_be_kept_on_disk():
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    module = torch.fx.GraphModule({}, graph)
    module.meta["_checkpoint_context_fn"] = _keep_dear
    assert _collect_context_fn_hashes(module) == [_keep_dear.cache_hash]
