"""Tensor parallel: the columns of the fast weight over 2 and 3 processes give what one process gives."""

from pathlib import Path

import processes
import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
from helpers import documented_code
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ttt_kernels as ttt
from ttt_kernels.distributed import FastWeightParallel, tensor_parallel_plan
from ttt_kernels.modules import BatchFacts, FastWeightMLP, WriteRule
from ttt_kernels.testing import make_inputs

D, F, C = 16, 37, 8  # F is not a multiple of the ranks
RULES = {
    "sgd": {},
    "sgd, norms": {"preserve_row_norm": True},
    "specnorm": {"inner_optimizer": "specnorm"},
    "specnorm, norms": {"inner_optimizer": "specnorm", "preserve_row_norm": True},
    "clip, norms": {"inner_optimizer": "clip", "max_norm": 0.5, "preserve_row_norm": True},
    "conv, norms": {"target": "conv", "preserve_row_norm": True},
}
LAYOUTS = {  # of two rows of 29 tokens
    "dense": lambda: BatchFacts(),
    "packed": lambda: BatchFacts(cu_seqlens=torch.tensor([0, 10, 40, 40, 58])),
    "padded": lambda: BatchFacts(valid=torch.arange(29) >= torch.tensor([[0], [7]])),
    "short": lambda: BatchFacts(cu_seqlens=torch.tensor([*range(0, 57, 7), 58])),
}


class GatedMLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias), nn.Linear(D, F, bias)
        self.down_proj, self.act_fn = nn.Linear(F, D, bias), nn.SiLU()


def build(name: str, bias: bool = True) -> FastWeightMLP:
    torch.manual_seed(0)
    mlp = FastWeightMLP(GatedMLP(bias), WriteRule(chunk_size=C, lr=0.4, **RULES[name]))
    for part in (mlp.ttt_proj, getattr(mlp, "ttt_conv", None)):
        if part is not None:
            nn.init.normal_(part.weight, std=0.3)
    with torch.no_grad():
        mlp.down_proj.weight[3] = 0  # a row without a direction
    return mlp


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def train_step(mlp: FastWeightMLP, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    mlp = mlp.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2, 29, D, generator=generator).to(dtype) for _ in range(2))
    y = mlp(x.requires_grad_(), LAYOUTS[layout]())
    y.backward(dy)
    grads = {f"d{n}": whole(p.grad) for n, p in mlp.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


CASES = [
    *((rule, layout, torch.float64) for rule in RULES for layout in LAYOUTS),
    *(("specnorm, norms", layout, torch.float32) for layout in LAYOUTS),
    ("specnorm, norms", "dense", torch.bfloat16),
    ("conv, norms", "dense", torch.bfloat16),
]


def layer_worker(rank: int, size: int) -> dict:
    mesh, found = dist.init_device_mesh("cpu", (size,)), {}
    for rule, layout, dtype in CASES:
        mlp = parallelize_module(build(rule).to(dtype), mesh, FastWeightParallel())
        local = mlp.down_proj.weight.to_local()
        assert local.shape[1] < F and mlp.gate_proj.weight.to_local().shape[0] == local.shape[1]
        found[rule, layout, dtype] = train_step(mlp, layout, dtype)
    with torch.no_grad():
        mlp = parallelize_module(build("sgd, norms"), mesh, FastWeightParallel())
        x = torch.ones(1, 20, D)
        found["disabled"] = mlp(x, BatchFacts(disabled=True))
        with torch.autocast("cpu", torch.bfloat16):
            found["autocast"] = mlp(x)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    results = []
    for call in (mlp, compiled):
        inputs = x.clone().requires_grad_()
        y = call(inputs)
        y.square().sum().backward()
        results.append((y.detach(), inputs.grad))
    found["compiled"] = max(relative(b, a) for a, b in zip(*results, strict=True))
    odd = build("sgd")
    odd.down_proj.weight = nn.Parameter(distribute_tensor(odd.down_proj.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="gate_proj.weight must be whole, or split along F"):
        parallelize_module(odd, mesh, FastWeightParallel())
    with pytest.raises(ValueError, match="already"):
        parallelize_module(mlp, mesh, FastWeightParallel())
    with pytest.raises(TypeError, match="must be a FastWeightMLP, got GatedMLP"):
        parallelize_module(GatedMLP(False), mesh, FastWeightParallel())
    with pytest.raises(NotImplementedError, match="closed form"):
        mlp(x, BatchFacts(disabled=True, observe=print))
    with pytest.raises(ValueError, match="patched by patch_model"):
        tensor_parallel_plan(GatedMLP(False))
    return found


MODELS = {
    "llama": {"inner_optimizer": "specnorm", "lr": 0.5, "preserve_row_norm": True},
    "qwen3": {"inner_optimizer": "clip", "max_norm": 0.05},
}


SIZES = {"num_hidden_layers": 3, "intermediate_size": 132}  # of plain layers, a multiple of the ranks


def model_loss(model: nn.Module, **kwargs) -> Tensor:
    x = tiny.ids(2, 37)
    logits = model(x, **kwargs).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def model_worker(rank: int, size: int) -> dict:
    mesh, found = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)), {}
    for family in MODELS:
        model = reference(family)
        plan: dict = tensor_parallel_plan(model)
        plan["model.layers.1.mlp.gate_proj"] = plan["model.layers.1.mlp.up_proj"] = ColwiseParallel()
        plan["model.layers.1.mlp.down_proj"] = RowwiseParallel()
        parallelize_module(model, mesh["tp"], plan)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model_loss(model.train())
        loss.backward()
        found[family] = loss.detach(), {n: whole(g) for n, g in tiny.gradients(model).items()}
    model.eval()
    with torch.no_grad():
        mask = torch.ones(2, 37, dtype=torch.long)
        mask[0, :5] = 0
        found["padded"] = model_loss(model, attention_mask=mask, use_cache=False)
        with ttt.disabled(model):
            found["disabled"] = model_loss(model, use_cache=False)
        for call in (model_loss, lambda m: m.generate(tiny.ids(1, 5), max_new_tokens=2)):
            with pytest.raises(NotImplementedError, match="cannot stream.*use_cache=False"):
                call(model)
        with pytest.raises(RuntimeError, match="must not be split over processes to be unpatched"):
            ttt.unpatch_model(model)
    return found


def loaded_worker(rank: int, size: int, folder: Path) -> dict:
    """Models that transformers splits while it loads them (two heads of keys: two ranks)."""
    mesh, found = dist.init_device_mesh("cpu", (size,)), {}
    for family in MODELS if size == 2 else ():
        model = ttt.from_pretrained(folder / family, tp_plan="auto")
        with pytest.raises(RuntimeError, match="all 132 columns, got 66.*tensor_parallel_plan"):
            model_loss(model, use_cache=False)
        parallelize_module(model, mesh, tensor_parallel_plan(model))
        with torch.no_grad():
            scored = model_loss(model, use_cache=False)
        loss = model_loss(model.train())
        loss.backward()
        grads = {n: whole(g) for n, g in tiny.gradients(model).items() if ".mlp." in n}
        found[family] = scored, loss.detach(), grads
    return found


def documented_worker(rank: int, size: int) -> dict:
    """The blocks of the page, in order, each rank with its tokens."""
    total, mine = 8 * size, slice(8 * rank, 8 * rank + 8)
    data, ids, positions = make_inputs(1, total, 24, 40), tiny.ids(2, total), torch.arange(total)[None]
    model = tiny.build("llama", num_hidden_layers=3, intermediate_size=132)
    names = {"model": model, "ids": ids, "positions": positions, "mine": mine}
    names.update(z=data.z[:, mine], v=data.v[:, mine], w0=data.w0)
    scan, models, tensor = documented_code("docs/parallel.md")
    exec(scan, names)
    exec(models, names)
    found = {"y": names["y"], "state": names["state"], "whole": model(ids).logits.detach()}
    exec(tensor, names)
    return {**found, "tensor": names["logits"].detach()}


def worker(rank: int, size: int, folder: Path) -> dict:
    return {
        "layers": layer_worker(rank, size),
        "models": model_worker(rank, size),
        "loaded": loaded_worker(rank, size, folder),
        "documented": documented_worker(rank, size),
    }


def reference(family: str) -> nn.Module:
    bias = {"mlp_bias": True} if family == "llama" else {}
    return tiny.patched(family, tiny.config(**MODELS[family]), **SIZES, **bias)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What every rank found, of 2 and of 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in MODELS:
        ttt.save_pretrained(reference(family), folder / family)
    return processes.run(worker, request.param, folder)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("rule", "layout", "dtype"), CASES[:-2])
def test_layer_equals_one_process(ranks, rule, layout, dtype):
    """Values and every gradient, the same on all ranks."""
    want = train_step(build(rule), layout, dtype)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for rank in ranks:
        got = rank["layers"][rule, layout, dtype]
        assert got.keys() == want.keys()
        errors = {k: relative(got[k], want[k]) if want[k].any() else float(got[k].norm()) for k in want}
        assert max(errors.values()) < bound, errors
    assert layout == "short" or all(want[k].any() for k in want)


@pytest.mark.parametrize(("rule", "layout", "dtype"), CASES[-2:])
def test_low_precision(ranks, rule, layout, dtype):
    """Partial sums are rounded before they are added: a little more error than one process has."""
    exact = train_step(build(rule).to(dtype), layout, torch.float64)
    alone = train_step(build(rule).to(dtype), layout, dtype)
    got = ranks[-1]["layers"][rule, layout, dtype]
    for name in exact:
        assert relative(got[name], exact[name]) < 1.5 * relative(alone[name], exact[name]) + 2e-3, name


def test_disabled_autocast_and_compiled(ranks):
    mlp, x = build("sgd, norms"), torch.ones(1, 20, D)
    with torch.no_grad():
        plain, want = mlp(x, BatchFacts(disabled=True)), mlp(x)
    assert relative(plain, want) > 1e-3
    for rank in ranks:
        assert relative(rank["layers"]["disabled"], plain) < 1e-6
        assert relative(rank["layers"]["autocast"], want) < 0.02
        assert rank["layers"]["compiled"] < 1e-6


def assert_near(got: Tensor, want: Tensor, name: str) -> None:
    atol = 1e-5 * float(want.abs().max()) + 1e-8
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol, msg=name)


def test_models(ranks):
    for family in MODELS:
        model = reference(family)
        loss = model_loss(model.train())
        loss.backward()
        want = tiny.gradients(model)
        for rank in ranks:
            got, grads = rank["models"][family]
            assert grads.keys() == want.keys() and abs(got - loss.detach()) < 1e-5
            for name, grad in want.items():
                assert_near(grads[name], grad, name)
            if family in rank["loaded"]:
                scored, loaded, grads = rank["loaded"][family]
                assert abs(scored - loss.detach()) < 1e-5 and abs(loaded - loss.detach()) < 1e-5
                for layer in tiny.LAYERS:
                    names = [n for n in want if f"layers.{layer}.mlp." in n]
                    assert len(names) >= 4
                    for name in names:
                        assert_near(grads[name], want[name], name)
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        padded = model_loss(model.eval(), attention_mask=mask)
        with ttt.disabled(model):
            disabled = model_loss(model)
    for rank in ranks:
        assert abs(rank["models"]["padded"] - padded) < 1e-5
        assert abs(rank["models"]["disabled"] - disabled) < 1e-5
    assert abs(padded - disabled) > 1e-3


def test_documented_code_runs(ranks):
    found = [rank["documented"] for rank in ranks]
    data = make_inputs(1, 8 * len(ranks), 24, 40)
    options = {"chunk_size": 8, "step_size": 0.3, "preserve_row_norm": True, "return_state": True}
    y, state = ttt.fast_weight_scan(data.z, data.v, data.w0, **options)
    torch.testing.assert_close(torch.cat([f["y"] for f in found], 1), y, rtol=1e-5, atol=1e-6)
    for f in found:
        torch.testing.assert_close(f["state"], state, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(f["tensor"], f["whole"], rtol=1e-4, atol=1e-5)
