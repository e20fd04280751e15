"""Patched models in training: gradients, checkpointing, threads, adapters, torch.compile."""

import threading

import pytest
import tiny_models as tiny
import torch
from torch import nn

import ttt_kernels as ttt


def train_step(model: nn.Module, x: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one step in training mode."""
    model.train()
    model.zero_grad()
    logits = model(x, **kwargs).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    return {"loss": loss.detach(), **tiny.gradients(model)}


def assert_close(got: dict, want: dict, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=atol, msg=name)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def padded_call():
    x, mask, _ = tiny.pad([tiny.ids(1, n, seed=n) for n in (45, 30)], "left")
    return x, {"attention_mask": mask}


def packed_call():
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None]
    return tiny.ids(1, 45), {"position_ids": positions}


CALLS = {"dense": lambda: (tiny.ids(2, 45), {}), "padded": padded_call, "packed": packed_call}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpointing_changes_no_gradient(family, call, reentrant):
    x, kwargs = call()
    want = train_step(tiny.patched(family), x, **kwargs)
    got = train_step(checkpointed(tiny.patched(family), reentrant), x, **kwargs)
    assert_close(got, want)
    added = [g for name, g in want.items() if "ttt_" in name]
    assert len(added) == 2 and all(g.abs().max() > 0 for g in added)


def test_checkpointing_with_embeddings():
    cfg = tiny.config(target="conv", target_source="input_embed")
    x = tiny.ids(2, 45)
    want = train_step(tiny.patched("llama", cfg), x)
    assert_close(train_step(checkpointed(tiny.patched("llama", cfg), False), x), want)
    assert {n.rpartition(".mlp.")[2] for n in want if "ttt_" in n} == (
        {"ttt_proj.weight", "ttt_conv.weight"}
    )
    with pytest.raises(NotImplementedError, match="reentrant .*use_reentrant"):
        train_step(checkpointed(tiny.patched("llama", cfg), True), x)


def test_every_parameter_gets_a_gradient_without_a_complete_chunk():
    """Distributed training stops on parameters that take part only sometimes."""
    model = tiny.patched()
    grads = train_step(model, tiny.ids(2, tiny.CHUNK - 1))
    assert grads.keys() == {"loss", *(n for n, _ in model.named_parameters())}
    assert not any(g.any() for n, g in grads.items() if "ttt_" in n)


def test_packed_gradients_are_the_sum_of_single_ones():
    model, rows = tiny.patched().double(), [tiny.ids(1, n, seed=n) for n in (20, 25)]

    def grads(x, **kwargs):
        model.zero_grad()
        model(x, **kwargs).logits.square().sum().backward()
        return {n: g.clone() for n, g in tiny.gradients(model).items()}

    positions = torch.cat([torch.arange(20), torch.arange(25)])[None]
    got = grads(torch.cat(rows, 1), position_ids=positions)
    first, second = map(grads, rows)
    assert_close(got, {n: first[n] + second[n] for n in first})


def test_autocast():
    model, x = tiny.patched(), tiny.ids(2, 45)
    want = train_step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = train_step(model, x)
    assert got.keys() == want.keys() and abs(got["loss"] - want["loss"]) < 0.05
    assert all(torch.isfinite(g).all() for g in got.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer", ["sgd", "specnorm"])
def test_other_precisions(dtype, optimizer):
    cfg = tiny.config(inner_optimizer=optimizer, lr=0.5)
    x = tiny.ids(2, 45)
    with torch.no_grad():
        want = tiny.patched("llama", cfg).double()(x).logits
        got = tiny.patched("llama", cfg).to(dtype)(x).logits
    assert got.dtype == dtype
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_threads_do_not_mix():
    """Calls that differ in layout, at once: a hand-over that is not per thread mixes them up."""
    model = tiny.patched()
    calls = [call() for call in CALLS.values()] + [(tiny.ids(1, 17), {})]
    with torch.no_grad():
        want = [model(x, **kwargs).logits for x, kwargs in calls]
    right, start = [], threading.Barrier(len(calls))

    def work(i: int) -> None:
        x, kwargs = calls[i]
        start.wait()
        for _ in range(10):
            with torch.no_grad():
                right.append(torch.equal(model(x, **kwargs).logits, want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 10 * len(calls) and all(right)


@pytest.mark.parametrize("call", [CALLS["dense"], CALLS["padded"]], ids=["dense", "padded"])
@pytest.mark.parametrize("variant", ["ntp", "conv"])
def test_compiles_in_one_graph(variant, call):
    changes = {"target": "conv", "target_source": "input_embed"} if variant == "conv" else {}
    cfg = tiny.config(inner_optimizer="specnorm", lr=0.5, **changes)
    x, kwargs = call()
    want = train_step(tiny.patched("llama", cfg, num_hidden_layers=3), x, **kwargs)
    torch._dynamo.reset()
    model = tiny.patched("llama", cfg, num_hidden_layers=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.train()
    logits = compiled(x, **kwargs).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    assert_close({"loss": loss.detach(), **tiny.gradients(model)}, want)
    torch._dynamo.reset()


@torch.no_grad()
def test_compiles_for_inference():
    torch._dynamo.reset()
    model, x = tiny.patched(), tiny.ids(2, 45)
    want = model(x).logits
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x).logits
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_compiling_does_not_guess_at_packing():
    """It needs values: an error in one graph, and right where dynamo may leave the graph."""
    torch._dynamo.reset()
    model = tiny.patched()
    x, kwargs = packed_call()
    with torch.no_grad():
        want = model(x, **kwargs).logits
        with pytest.raises(Exception, match="packing cannot be read from position_ids"):
            torch.compile(model, fullgraph=True, backend="eager")(x, **kwargs)
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(x, **kwargs).logits
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


TARGETS = (["gate_proj", "up_proj", "down_proj"], "all-linear")


def adapted(model: nn.Module, targets) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def randomise(adapter: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, p in adapter.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("adapter_first", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=["mlp", "all-linear"])
def test_adapters(targets, adapter_first):
    """LoRA on down_proj is the fast weight of W0 + BA; unpatching leaves the adapter in place."""
    pytest.importorskip("peft", reason="needs peft")
    x, plain = tiny.ids(2, 30), tiny.patched()
    base = tiny.build() if adapter_first else tiny.patched()
    adapter = adapted(base, targets)
    if adapter_first:
        ttt.patch_model(adapter, tiny.config())
        for own, other in zip(tiny.fast_mlps(adapter), tiny.fast_mlps(plain), strict=True):
            own.ttt_proj.load_state_dict(other.ttt_proj.state_dict())
    assert not any("lora" in n and "ttt_proj" in n for n, _ in adapter.named_parameters())
    randomise(adapter)
    adapter.eval()
    with torch.no_grad():
        got = adapter(x).logits
        with adapter.disable_adapter():
            assert torch.equal(adapter(x).logits, plain(x).logits)
        assert (got - plain(x).logits).abs().max() > 1e-3
    assert any("layers.0.mlp.down_proj.lora_A" in n for n in train_step(adapter, x))
    ttt.unpatch_model(adapter)
    other = adapted(tiny.build(), targets)
    randomise(other)
    with torch.no_grad():
        assert torch.equal(adapter.eval()(x).logits, other.eval()(x).logits)
