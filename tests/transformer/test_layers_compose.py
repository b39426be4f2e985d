"""The layers under what torch puts around modules: compilation, export, transforms, checkpoints, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fusedformer import nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
D = 16


class Model(torch.nn.Module):
    """An encoder and a decoder with padding and causality."""

    def __init__(self, norm_first: bool = False, dropout: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            D, 2, layers, layers, 24, dropout, batch_first=True, norm_first=norm_first, bias=not norm_first
        )

    def forward(self, src: Tensor, tgt: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.transformer(
            src, tgt, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return out


def inputs(batch: int = 2, len_src: int = 7, len_tgt: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    padding = torch.arange(len_src) >= torch.randint(1, len_src + 1, (batch, 1))
    return torch.randn(batch, len_src, D), torch.randn(batch, len_tgt, D), padding


def gradients(model: torch.nn.Module, given: tuple[Tensor, ...], run: Any = None) -> list[Tensor]:
    model.zero_grad()
    out = (model if run is None else run)(*given)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_compiles_whole_with_changing_sizes() -> None:
    model = Model()
    model.transformer.encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 24, 0.0, batch_first=True, norm_first=True), 1
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 7, 5), (3, 9, 4)):
        given = inputs(*sizes)
        torch.testing.assert_close(gradients(model, given, compiled), gradients(model, given))


def test_compiles_whole_with_dropout_and_a_hook_inside() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 24, 0.2, batch_first=True)
    layer.linear1.register_forward_hook(lambda module, args, out: out * 3)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, D)
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))
        torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_is_traced() -> None:
    """Without gradients too, where a small call goes a shorter way, whose results a trace could not hold."""
    model = Model().eval()
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, inputs())
        given = inputs()
        torch.testing.assert_close(traced(*given), model(*given))


def test_is_exported_with_changing_sizes() -> None:
    model, given = Model().eval(), inputs()
    batch, source = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("source", min=2, max=64)
    target = torch.export.Dim("target", min=2, max=64)
    shapes = {"src": {0: batch, 1: source}, "tgt": {0: batch, 1: target}, "padding": {0: batch, 1: source}}
    program = torch.export.export(model, given, dynamic_shapes=shapes)
    others = inputs(3, 9, 4)
    torch.testing.assert_close(program.module()(*others), model(*others))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("attention_forward" in name for name in names) == 3


@pytest.mark.parametrize("norm_first", [False, True])
def test_checkpointing_draws_the_same_dropout(norm_first: bool) -> None:
    model, given = Model(norm_first, dropout=0.3), inputs()

    def checkpointed(*given: Tensor) -> Any:
        return checkpoint(model, *given, use_reentrant=False)

    results = []
    for run in (checkpointed, model):
        torch.manual_seed(5)
        results.append(gradients(model, given, run))
    torch.testing.assert_close(*results)


def test_gives_gradients_of_each_sample() -> None:
    model = Model(norm_first=True).double()
    src, tgt, padding = (x.double() if x.is_floating_point() else x for x in inputs(3))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, tuple(x[None] for x in sample))
        return out.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, src, tgt, padding)
    for i in range(3):
        one = slice(i, i + 1)
        expected = gradients(model, (src[one], tgt[one], padding[one]))[1:]
        torch.testing.assert_close([grads[name][i] for name in parameters], expected)


def test_autocast_keeps_the_residual_in_its_own_precision() -> None:
    for norm_first in (False, True):
        ours = nn.TransformerEncoderLayer(D, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
        theirs = torch.nn.TransformerEncoderLayer(D, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 7, D)
        x[..., 0] += 1000.0  # bfloat16 would round it by units
        truth = theirs.double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            out, dropped = ours(x), copy.deepcopy(ours)
            dropped.dropout2.p = 1.0
            expected = theirs.float()(x)
        assert out.dtype == expected.dtype == torch.float32
        assert (out - truth).abs().max() <= 2 * (expected - truth).abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            assert dropped(x).dtype == torch.float32


def _train(rank: int, folder: str) -> None:
    """In one of two processes: a step of DDP and one of FSDP2, each with the gradients of the whole batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(11)
        model, given = Model(norm_first=True, layers=2), inputs(4)
        own = tuple(x[2 * rank : 2 * rank + 2] for x in given)
        alone = copy.deepcopy(model)
        alone(*given).square().mean().backward()
        expected = {name: p.grad for name, p in alone.named_parameters()}

        shared = DistributedDataParallel(copy.deepcopy(model))
        shared(*own).square().mean().backward()
        for name, p in shared.module.named_parameters():
            torch.testing.assert_close({name: p.grad}, {name: expected[name]})

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        stacks = (model.transformer.encoder, model.transformer.decoder)
        for layer in [layer for stack in stacks for layer in stack.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(*own).square().mean().backward()
        for name, p in model.named_parameters():
            assert isinstance(p.grad, DTensor)
            torch.testing.assert_close({name: p.grad.full_tensor()}, {name: expected[name]})
        Path(folder, f"done{rank}").touch()
        torch.distributed.barrier()  # neither goes while the other may still talk to it
    finally:
        torch.distributed.destroy_process_group()


def test_trains_in_two_processes(tmp_path: Path) -> None:
    spawn(_train, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_result_is_no_view(norm_first: bool) -> None:
    """Of which FSDP warns: its hooks on a view are lost where something is written into it in place."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    for module in (layer, nn.FeedForward(16, 32), nn.MultiheadAttention(16, 2)):
        x = torch.randn(2, 3, 16, requires_grad=True)
        out = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)
        assert out._base is None
