"""Context parallel: the sequence over 2 and 3 processes gives what one process gives."""

import re

import processes
import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ttt_kernels as ttt
from ttt_kernels.distributed import context, context_parallel_scan, prefix
from ttt_kernels.testing import ScanInputs, contract_scan, error_ratio, exact_scan, make_inputs

C = 8
LENGTHS = {  # tokens of every rank
    2: {"uneven": (24, 13), "even": (16, 16), "idle": (8, 0), "open": (5, 0)},
    3: {"uneven": (16, 24, 11), "even": (8, 8, 8), "idle": (8, 16, 0), "open": (13, 0, 0)},
}
CASES = {
    "plain": {},
    "sliced": {"slices": 3},
    "norms": {"preserve_row_norm": True, "slices": 3},
    "steps": {"steps": True, "slices": 2},
    "all": {"preserve_row_norm": True, "steps": True, "state": True},
    "state": {"state": True, "slices": 2},
    "number": {"preserve_row_norm": True, "state": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
RUNS = [
    *((case, "uneven", dtype) for case in CASES for dtype in DTYPES),
    *(("all", lengths, "float64") for lengths in ("even", "idle", "open")),
]


def make_case(name: str, tokens: int, dtype: torch.dtype) -> tuple[ScanInputs, dict[str, Tensor], dict]:
    """Inputs of the whole sequence, the optional tensors, and the other options."""
    case = CASES[name]
    data = make_inputs(2, tokens, 48, 80, dtype=dtype, write_scale=0.05)
    acc, generator = torch.promote_types(dtype, torch.float32), torch.Generator().manual_seed(1)
    extra = {}
    if case.get("steps"):
        extra["step_size"] = 0.2 + 0.2 * torch.rand(2, -(-tokens // C), generator=generator, dtype=acc)
    if case.get("state"):
        noise = 0.02 * torch.randn(2, 48, 80, generator=generator, dtype=acc)
        extra["state"] = data.w0.to(acc) + noise
    options = {"preserve_row_norm": case.get("preserve_row_norm", False), "chunk_size": C}
    return data, extra, {**options, **({} if case.get("steps") else {"step_size": 0.3})}


def shard(lengths: tuple[int, ...], rank: int) -> tuple[slice, slice]:
    """Where this rank's tokens and chunks are."""
    start = sum(lengths[:rank])
    stop = start + lengths[rank]
    return slice(start, stop), slice(start // C, -(-stop // C) if stop > start else start // C)


def differentiate(scan, data, extra, tokens=slice(None), chunks=slice(None), share=1.0) -> dict:
    """Outputs and gradients for sum(y dy) + share * mean(state^2)."""
    leaves = {"z": data.z[:, tokens], "v": data.v[:, tokens], "w0": data.w0, **extra}
    if "step_size" in extra:
        leaves["step_size"] = extra["step_size"][:, chunks]
    leaves = {k: t.detach().clone().requires_grad_() for k, t in leaves.items()}
    y, state = scan(**leaves, return_state=True)
    ((y * data.dy[:, tokens]).sum() + share * state.square().mean()).backward()
    grads = {f"d{k}": t.grad for k, t in leaves.items()}
    return {"y": y.detach(), "state": state.detach(), **grads}


def scan_worker(rank: int, size: int) -> dict:
    """Every run, of this rank; what is a sum over the ranks is summed here."""
    found = {}
    for name, lengths, dtype in RUNS:
        lengths = LENGTHS[size][lengths]
        data, extra, options = make_case(name, sum(lengths), DTYPES[dtype])
        context.MIN_SLICE_ROWS = 48 // CASES[name].get("slices", 1)

        def scan(options=options, **tensors):
            return context_parallel_scan(**tensors, **options, group=dist.group.WORLD)

        tokens, chunks = shard(lengths, rank)
        result = differentiate(scan, data, extra, tokens, chunks, share=1 / size)
        for total in ("dw0", "dstate"):
            if total in result:
                exact = result[total].to(torch.promote_types(result[total].dtype, torch.float32))
                dist.all_reduce(exact)
                result[total] = exact.to(result[total].dtype)
        found[name, lengths, dtype] = result
    return found


# --- refusing together, and what else a call may be part of ------------------------------------------
def refusal(scan, **arguments) -> str:
    try:
        scan(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def odd_worker(rank: int, size: int) -> dict:
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    data = make_inputs(1, 16, 24, 40)
    good = {"z": data.z, "v": data.v, "w0": data.w0, "chunk_size": C, "step_size": 0.3, "group": mesh}
    first = rank == 0
    short = slice(0, 13 if first else 16)
    bad = {
        "cut": {"z": data.z[:, short], "v": data.v[:, short]},
        "shape": {"v": data.v[..., :7]} if first else {},
        "dtype": {k: t.half() for k, t in (("z", data.z), ("v", data.v), ("w0", data.w0)) if first},
        "chunk_size": {"chunk_size": 16 if first else 8},
        "step_size": {"step_size": torch.full((1, 2), 0.3) if first else 0.3},
        "state": {"state": data.w0[None].clone()} if first else {},
        "gradient": {"z": data.z.clone().requires_grad_()} if first else {},
        "impl": {"impl": "reference"},
    }
    found = {name: refusal(context_parallel_scan, **{**good, **change}) for name, change in bad.items()}
    found["group"] = refusal(context_parallel_scan, **{**good, "group": "world"})
    plane = dist.init_device_mesh("cpu", (size, 1))
    found["mesh"] = refusal(context_parallel_scan, **{**good, "group": plane})
    with torch.no_grad():
        y, state = context_parallel_scan(**good)
        found["inference"] = y if state is None else None

    z = data.z.clone().requires_grad_()

    def call(z):
        return context_parallel_scan(**{**good, "z": z})[0].square()

    once = torch.autograd.grad(call(z).sum(), z)[0]
    for reentrant in (False, True):
        z.grad = None
        checkpoint(call, z, use_reentrant=reentrant).sum().backward()
        found["checkpoint", reentrant] = torch.equal(z.grad, once)
    kept = call(z).sum()
    twice = [torch.autograd.grad(kept, z, retain_graph=True)[0] for _ in range(2)]
    found["second backward"] = all(torch.equal(g, once) for g in twice)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = context_parallel_scan(**{**good, "z": z})
        found["autocast"] = y.detach()
        found["autocast gradient"] = torch.autograd.grad(y.float().sum(), z)[0]
    return found


def order_worker(rank: int, size: int) -> list[str]:
    """What happens when, forward and backward, with a state in three slices."""
    data, events = make_inputs(1, 16, 24, 40), []

    def noting(name, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "MIN_SLICE_ROWS", 8)
        for owner, function, name in (
            (context, "_written", "write"),
            (context, "scan_fwd", "scan"),
            (context, "scan_bwd", "scan"),
            (context._Gradients, "add_write", "write"),
            (prefix._PrefixSum, "_all_to_all", "send"),
        ):
            patch.setattr(owner, function, noting(name, getattr(owner, function)))
        z = data.z.clone().requires_grad_()
        y, _ = context_parallel_scan(z, data.v, data.w0, group=dist.group.WORLD, chunk_size=C)
        events.append("backward")
        y.sum().backward()
    return events


# --- one launch for everything ------------------------------------------------------------------------
def worker(rank: int, size: int) -> dict:
    return {
        "scans": scan_worker(rank, size),
        "odd": odd_worker(rank, size),
        "order": order_worker(rank, size),
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request) -> list[dict]:
    """What every rank found, of 2 and of 3."""
    return processes.run(worker, request.param)


def joined(parts: list[dict]) -> dict[str, Tensor]:
    """What the ranks have together; what they all have must be equal."""
    whole = {}
    for name, first in parts[0].items():
        if name in ("state", "dw0", "dstate"):
            assert all(torch.equal(part[name], first) for part in parts)
            whole[name] = first
        else:
            whole[name] = torch.cat([part[name] for part in parts], 1)
    return whole


@pytest.mark.parametrize(("name", "split", "dtype"), [r for r in RUNS if r[2] != "bfloat16"])
def test_equals_one_process(ranks, name, split, dtype):
    lengths = LENGTHS[len(ranks)][split]
    got = joined([rank["scans"][name, lengths, dtype] for rank in ranks])
    data, extra, options = make_case(name, sum(lengths), DTYPES[dtype])
    want = differentiate(lambda **t: ttt.fast_weight_scan(**t, **options), data, extra)
    assert_close(got, want, {"float32": 1e-5, "float64": 1e-12}[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "state" not in c])
def test_within_the_budget(ranks, name, dtype):
    lengths = LENGTHS[len(ranks)]["uneven"]
    got = joined([rank["scans"][name, lengths, dtype] for rank in ranks])
    data, extra, options = make_case(name, sum(lengths), DTYPES[dtype])
    options = {**options, **extra}
    exact, contract = exact_scan(data, **options), contract_scan(data, **options)
    per_token = ("y", "dz", "dv")
    ratios = {
        k: error_ratio(got[k], contract[k], exact[k], chunk_size=C if k in per_token else None)
        for k in exact
    }
    assert max(ratios.values()) <= 1, ratios


REFUSED = {  # on rank 0, which is the odd one, and on the others
    "cut": ("ValueError: every rank but the last .*multiple of chunk_size = 8 .*\\[13, 16",) * 2,
    "shape": ("ValueError: v must have shape", "rank 0 of the group refused .*v must have shape"),
    "dtype": ("ValueError: the dtype of z must be the same on all ranks",) * 2,
    "chunk_size": ("ValueError: chunk_size must be the same .*\\[16, 8",) * 2,
    "step_size": ("ValueError: the kind of step_size must be the same",) * 2,
    "state": ("ValueError: whether state is given must be the same",) * 2,
    "gradient": ("ValueError: which arguments require gradients must be the same",) * 2,
    "impl": ("NotImplementedError: impl='reference'",) * 2,
    "group": ("TypeError: group must be a ProcessGroup or a DeviceMesh, got str",) * 2,
    "mesh": ("ValueError: group must be .*one dimension",) * 2,
}


def test_refuses_together(ranks):
    """An error on one rank alone would leave the others waiting."""
    for rank, found in enumerate(ranks):
        for name, messages in REFUSED.items():
            message = found["odd"][name]
            assert re.search(messages[min(rank, 1)], message), (name, message)


def test_communication_overlaps(ranks):
    """Each slice is on its way, there and back, while others are computed."""
    for rank, found in enumerate(ranks):
        forward, _, backward = " ".join(found["order"]).partition(" backward ")
        assert forward == "write send write send send write send send scan send scan scan"
        rest = "send" if rank == len(ranks) - 1 else "write send write write"
        assert backward == f"scan send scan send send scan send send {rest}"


def test_works_inside_other_things(ranks):
    """Inference, checkpointing, a kept graph, autocast; after all those refusals."""
    found = [rank["odd"] for rank in ranks]
    data = make_inputs(1, 16, 24, 40)
    z, v = (torch.cat([t] * len(ranks), 1) for t in (data.z, data.v))
    want, _ = ttt.fast_weight_scan(z, v, data.w0, chunk_size=C, step_size=0.3)
    got = torch.cat([f["inference"] for f in found], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got = torch.cat([f["autocast"] for f in found], 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    for f in found:
        assert f["checkpoint", False] and f["checkpoint", True] and f["second backward"]
        assert f["autocast gradient"].dtype == torch.float32


@pytest.mark.parametrize("write_scale", [0.005, 0.05])
def test_starting_states_beat_a_correction(write_scale):
    """`y += z P^T` after a scan from w0 rounds one weight twice, which a budget of RMS errors sees."""
    data = make_inputs(1, 512, 256, 384, dtype=torch.bfloat16, write_scale=write_scale)
    options, half = {"chunk_size": 64, "step_size": 0.3}, slice(256, None)
    exact = exact_scan(data, **options)["y"][:, half]
    z, v = data.z[:, half], data.v[:, half]
    _, start = ttt.fast_weight_scan(
        data.z[:, :256], data.v[:, :256], data.w0, return_state=True, **options
    )
    before = start - data.w0.float()
    corrected = ttt.fast_weight_scan(z, v, data.w0, **options)[0] + ttt.fast_weight_apply(z, before)
    started, _ = ttt.fast_weight_scan(z, v, data.w0, state=start, **options)
    contract = contract_scan(data, **options)["y"][:, half]
    allowed = (contract.double() - exact).norm()
    assert (started.double() - exact).norm() < 1.01 * allowed
    assert (corrected.double() - exact).norm() > 1.15 * allowed
