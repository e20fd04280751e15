"""Context parallel models: 2 and 3 processes, each with some of the tokens, give what one gives."""

import copy
import pickle

import processes
import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ttt_kernels as ttt
from ttt_kernels.distributed import context_parallel


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone())
        return grad


def attend_to_all(module, query, key, value, mask, scaling=None, **kwargs):
    """Causal attention of this rank's tokens to those of all ranks: keys and values are gathered."""
    total, tokens = module.config.context_parallel_tokens

    def gathered(x: Tensor) -> Tensor:
        return SumOverRanks.apply(nn.functional.pad(x, (0, 0, tokens.start, total - tokens.stop)))

    visible = torch.arange(total) <= torch.arange(tokens.start, tokens.stop)[:, None]
    y = nn.functional.scaled_dot_product_attention(
        query, gathered(key), gathered(value), visible, scale=scaling, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous(), None


MODELS = {
    "sharded": {"preserve_row_norm": True},
    "specnorm": {"inner_optimizer": "specnorm", "lr": 0.5, "preserve_row_norm": True},
    "clip": {"inner_optimizer": "clip", "max_norm": 0.05},
    "conv": {"target": "conv", "target_source": "input_embed"},
}
LENGTHS = {2: (16, 21), 3: (24, 8, 11)}


def train_step(model: nn.Module, x: Tensor, tokens: slice, **kwargs) -> tuple[Tensor, dict]:
    """Sum of the loss at `tokens`, and the gradients; targets are the next tokens of the whole."""
    model.train()
    logits = model(x[:, tokens], **kwargs).logits
    targets = nn.functional.pad(x[:, 1:], (0, 1), value=-100)[:, tokens]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return logits.detach(), tiny.gradients(model)


def refused_on_one_rank(model: nn.Module, x: Tensor, rank: int) -> None:
    """What the first rank alone cannot read: the others hear of it."""
    batch, length = x.shape
    packed = {"cu_seq_lens_q": torch.tensor([0, batch * length]), "use_cache": True}
    for train, reason, arguments in (
        (False, "must be None or 2D", {"attention_mask": torch.ones(batch, 1, length, length)}),
        (False, "attention_mask must have shape", {"attention_mask": torch.ones(batch, length + 1)}),
        (False, "packed rows cannot stream", packed),
        (True, "past_key_values holds tokens", {"past_key_values": filled_cache(length)}),
        (False, "no attribute 'shape'", {"input_ids": None}),
        (False, "exactly one of input_ids and", {"inputs_embeds": torch.zeros(batch, length, 64)}),
    ):
        model.train(train)
        told = reason if rank == 0 else f"rank 0 of the group refused its arguments: .*{reason}"
        with pytest.raises(Exception if rank == 0 else ValueError, match=told):
            model(**{"input_ids": x, **(arguments if rank == 0 else {})})
    model.eval()
    with pytest.raises(ValueError, match=r"every rank must hold tokens of the sequence, got \[.*\b0\]"):
        model(x[:, : 0 if rank == dist.get_world_size() - 1 else 8])


def filled_cache(tokens: int):
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, tokens, 16), torch.zeros(2, 2, tokens, 16), 0)
    return cache


def worker(rank: int, size: int) -> dict:
    from transformers import AttentionInterface

    AttentionInterface.register("gathered", attend_to_all)
    lengths = LENGTHS[size]
    tokens, total = slice(sum(lengths[:rank]), sum(lengths[: rank + 1])), sum(lengths)
    x, found = tiny.ids(2, total), {}
    call = {"position_ids": torch.arange(total)[None, tokens]}
    for name, changes in MODELS.items():
        model = tiny.patched("llama", tiny.config(**changes), num_hidden_layers=3)
        if name == "sharded":  # parameters over the same ranks, as data parallelism has them
            mesh = dist.init_device_mesh("cpu", (size,))
            for layer in (*model.model.layers, model):
                fully_shard(layer, mesh=mesh)
        handle = context_parallel(model, dist.group.WORLD)
        model.config._attn_implementation = "gathered"
        model.config.context_parallel_tokens = total, tokens
        if name == "specnorm":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found[name], grads = train_step(model, x, tokens, **call)
        for key, grad in grads.items():
            if isinstance(grad, DTensor):  # an average
                grads[key] = grad.full_tensor() * size
            else:
                dist.all_reduce(grad)
        found[name, "gradients"] = grads
    model.eval()
    with torch.no_grad():
        with ttt.disabled(model):
            found["disabled"] = model(x[:, tokens], **call).logits
        mask = torch.ones(2, lengths[rank], dtype=torch.long)
        found["mask"] = model(x[:, tokens], attention_mask=mask, **call).logits
        found["copy"] = copy.deepcopy(model)(x[:, tokens], **call).logits
        refused_on_one_rank(model, x[:, tokens], rank)
        mask[0, :3] = 0  # on one rank only
        mask = mask if rank == 0 else None
        packed = torch.arange(lengths[rank]).roll(4)[None]
        for error, reason, arguments in (
            (NotImplementedError if rank == 0 else ValueError, "padding", {"attention_mask": mask}),
            (NotImplementedError, "packed sequences", {"position_ids": packed}),
            (NotImplementedError, "cannot stream", {"use_cache": True, **call}),
            (ValueError, "multiple of chunk_size", {"input_ids": x[:, : 9 + rank]}),
        ):
            with pytest.raises(error, match=reason):
                model(**{"input_ids": x[:, tokens], **arguments})
        with pytest.raises(NotImplementedError, match="cannot stream"):
            model.generate(x[:, :8], max_new_tokens=2)
        with pytest.raises(ValueError, match="must not be distributed already"):
            context_parallel(model, dist.group.WORLD)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(model)
        with pytest.raises(RuntimeError, match="must not be split over processes to be unpatched"):
            ttt.unpatch_model(model)
        handle.remove()
        model.config._attn_implementation = "sdpa"
        found["removed"] = model(x).logits
        again = context_parallel(model, dist.group.WORLD)
        handle.remove()  # of another: nothing happens
        with pytest.raises(ValueError, match="must not be distributed already"):
            context_parallel(model, dist.group.WORLD)
        again.remove()
        assert torch.equal(model(x).logits, found["removed"])
    return found


@pytest.mark.parametrize("size", LENGTHS)
def test_models_read_across_ranks(size):
    x, ranks = tiny.ids(2, sum(LENGTHS[size])), processes.run(worker, size)
    for name, changes in MODELS.items():
        model = tiny.patched("llama", tiny.config(**changes), num_hidden_layers=3)
        want, grads = train_step(model, x, slice(None))
        got = torch.cat([found[name] for found in ranks], 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert grads.keys() == ranks[0][name, "gradients"].keys()
        for key, grad in grads.items():
            close = {"rtol": 1e-4, "atol": 1e-5 * float(grad.abs().max()) + 1e-6, "msg": key}
            torch.testing.assert_close(ranks[-1][name, "gradients"][key], grad, **close)
        assert max(g.abs().max() for n, g in grads.items() if "ttt_" in n) > 0
    model.eval()
    with torch.no_grad(), ttt.disabled(model):
        plain = model(x).logits
    assert (plain - want).abs().max() > 1e-3  # the fast weights of the model matter
    for name, expected in (("disabled", plain), ("mask", want), ("copy", want)):
        got = torch.cat([found[name] for found in ranks], 1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for found in ranks:
        torch.testing.assert_close(found["removed"], want, rtol=1e-4, atol=1e-5)
