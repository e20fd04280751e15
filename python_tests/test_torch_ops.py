"""The ops as citizens of torch: fakes, compilation, autocast, checkpoints, torch.func, modes."""

import itertools

import pytest
import torch
from helpers import C, Call, apply_call, assert_close, assert_same, randn, results, scan_call
from test_ridge import ridge_samples
from test_step import step_samples
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ttt_kernels as ttt
from ttt_kernels._config import chosen_implementation
from ttt_kernels.types import compute_dtype

RAW = torch.ops.ttt_kernels
D, F = 5, 7
PACKED = [0, 5, 5, 11]


def pair(*, packed=False, dtype=torch.float64):
    """z, v [B, 11, .], w0 and cu_seqlens."""
    b = 1 if packed else 2
    z, v = randn(b, 11, F, dtype=dtype), randn(b, 11, D, seed=1, dtype=dtype)
    return z, v, randn(D, F, seed=2, dtype=dtype), torch.tensor(PACKED) if packed else None


def step_op(rule, **options) -> Call:
    z, v, _, cu = pair(**options)
    op, extra = {
        "spectral": (ttt.spectral_step_size, {}),
        "clipped": (ttt.clipped_step_size, {"max_norm": 9.0}),
    }[rule]
    return Call(op, {"z": z, "v": v}, {"chunk_size": C, "lr": 0.3, "cu_seqlens": cu, **extra})


def target_op(kind, *, proj=True, **options) -> Call:
    _, x, _, cu = pair(**options)
    p = {"proj": randn(D, D, seed=3, dtype=x.dtype)} if proj else {}
    fixed = {"chunk_size": C, "cu_seqlens": cu} | ({} if proj else {"proj": None})
    if kind == "next":
        return Call(ttt.next_token_target, {"x": x, **p}, fixed)
    weight = randn(D, 1, 5, seed=4, dtype=x.dtype)
    return Call(ttt.conv_target, {"u": x, "conv_weight": weight, **p}, fixed)


def all_calls(dtype=torch.float64) -> dict[str, Call]:
    """Every op, dense and packed, with and without its optional tensors."""
    calls = {}
    for packed in (False, True):
        where = "packed" if packed else "dense"
        cu = PACKED if packed else None
        full = {"state": True, "steps": True, "preserve_row_norm": True}
        calls[f"scan_{where}"] = scan_call(2, 11, cu=cu, dtype=dtype)
        calls[f"scan_{where}_no_state"] = scan_call(2, 11, cu=cu, dtype=dtype, return_state=False)
        calls[f"scan_{where}_full"] = scan_call(2, 11, cu=cu, dtype=dtype, **full)
        for kind, proj in itertools.product(("next", "conv"), (False, True)):
            name = f"{kind}_{where}" + ("_proj" if proj else "")
            calls[name] = target_op(kind, proj=proj, packed=packed, dtype=dtype)
        for rule in ("spectral", "clipped"):
            calls[f"{rule}_{where}"] = step_op(rule, packed=packed, dtype=dtype)
    calls["apply"] = apply_call(dtype=dtype)
    calls["apply_shared"] = apply_call(pool=1, dtype=dtype, scale=True)
    calls["apply_slots"] = apply_call(slots=[4, 0, 4], pool=6, dtype=dtype, scale=True)
    return calls


CALLS = all_calls()
LOW = all_calls(torch.bfloat16)


# Raw ops


def scan_samples(dtype):
    flags = itertools.product([False, True], repeat=4)
    for packed, (state, steps, preserve, keep) in itertools.product([False, True], flags):
        z, v, w0, cu = pair(packed=packed, dtype=dtype)
        acc, rows = compute_dtype(dtype), len(PACKED) - 1 if packed else 2
        start = randn(rows, D, F, seed=5, dtype=acc) if state else None
        size = randn(len(z), 4 if packed else 3, seed=6, dtype=acc) if steps else None
        common = (z, v, w0, size, 0.3, start, cu, C, preserve, keep)
        forward = (*common, True, "eager")
        y, carried = RAW.scan_fwd(*forward)
        dstate = torch.ones_like(carried) if keep else None
        yield "scan_fwd", forward
        yield "scan_fwd", (*common, False, "eager")
        yield "scan_bwd", (torch.ones_like(y), dstate, carried, *common, "eager")
        yield "scan_bwd_consume", (torch.ones_like(y), dstate, carried.clone(), *common, "eager")


def other_samples(dtype):
    for packed in (False, True):
        z, v, _, cu = pair(packed=packed, dtype=dtype)
        weight = randn(D, 1, 5, seed=4, dtype=dtype)
        for proj in (None, randn(D, D, seed=3, dtype=dtype)):
            yield "next_token_target_fwd", (v, proj, C, 1, cu, "eager")
            yield "next_token_target_bwd", (v, v, proj, C, 2, cu, "eager")
            yield "conv_target_fwd", (v, weight, proj, C, cu, "eager")
            yield "conv_target_bwd", (v, v, weight, proj, C, cu, "eager")
        steps = randn(len(z), 4 if packed else 3, seed=6, dtype=compute_dtype(dtype))
        for rule in (("spectral", 0.3, 5.0), ("clipped", 0.3, 9.0)):
            yield "step_size_fwd", (z, v, C, cu, *rule, "eager")
            yield "step_size_bwd", (steps, z, v, C, cu, *rule, "eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [scan_samples, other_samples])
def test_opcheck(samples, dtype):
    """Schema (no hidden mutation or aliasing), fake against real, and AOT dispatch."""
    seen = set()
    for name, arguments in samples(dtype):
        seen.add(name)
        utils = ["test_schema", "test_faketensor"]
        torch.library.opcheck(getattr(RAW, name).default, arguments, test_utils=utils)
    assert len(seen) == (3 if samples is scan_samples else 6)


@pytest.mark.parametrize("samples", [scan_samples, other_samples])
def test_opcheck_dispatch(samples):
    """The whole check, dynamic shapes included, on the first and last sample of each op."""
    chosen = {}
    for name, arguments in samples(torch.float32):
        chosen.setdefault(name, [arguments, arguments])[1] = arguments
    for name, both in chosen.items():
        for arguments in both:
            torch.library.opcheck(getattr(RAW, name).default, arguments)


@pytest.mark.parametrize("samples", [scan_samples, other_samples])
def test_opcheck_triton(samples):
    """The same of the fused kernels: the first and last sample of each op."""
    chosen = {}
    for name, arguments in samples(torch.float32):
        chosen.setdefault(name, [arguments, arguments])[1] = arguments
    for name, both in chosen.items():
        for arguments in both:
            arguments = (*(on_device(a) for a in arguments[:-1]), "triton")
            utils = ["test_schema", "test_faketensor"]
            torch.library.opcheck(getattr(RAW, name).default, arguments, test_utils=utils)


def on_device(x):
    gpu = isinstance(x, torch.Tensor) and torch.cuda.is_available()
    return x.cuda() if gpu else x


def test_every_raw_op_is_checked():
    names = {n.partition("::")[2].partition(".")[0] for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("ttt_kernels::")}  # fmt: skip
    everything = (scan_samples, other_samples, step_samples, ridge_samples)
    checked = {n for s in everything for n, _ in s(torch.float32)}
    assert names == checked


@pytest.mark.parametrize("name", CALLS)
def test_meta_shapes_through_the_public_op(name):
    """A fake tensor mode sees the shapes, dtypes and layouts of the real thing; NC is unbacked."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for call in (CALLS[name], LOW[name]):
        real = call()
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with mode:
            changes = {k: mode.from_tensor(t, static_shapes=True) for k, t in call.tensors.items()}
            others = {k: t for k, t in call.options.items() if isinstance(t, torch.Tensor)}
            fake = call(**changes, **{k: mode.from_tensor(t) for k, t in others.items()})
        real, fake = ((r,) if isinstance(r, torch.Tensor) else r for r in (real, fake))
        for a, b in zip(real, fake, strict=True):
            if a is None:
                assert b is None
                continue
            assert a.dtype == b.dtype and a.dim() == b.dim() and b.is_contiguous()
            for n, m in zip(a.shape, b.shape, strict=True):
                assert not isinstance(m, int) or n == m


@pytest.mark.parametrize("name", CALLS)
def test_runs_under_a_dispatch_mode(name):
    """Profiling and counting modes run the ops below autograd."""
    with FlopCounterMode(display=False):
        got = results(CALLS[name])
    assert_same(got, results(CALLS[name]))


# Compilation


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name):
    """Forward and backward, no graph break, the same bits."""
    call = CALLS[name]
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    assert_same(results(Call(compiled, call.tensors, call.options)), results(call))


def inner_loop(x, z, proj, w0, cu_seqlens=None, chunk_size=C, state=None):
    """What a layer computes: target, step size, scan."""
    v = ttt.next_token_target(x, proj, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    s = ttt.spectral_step_size(z, v, chunk_size=chunk_size, lr=0.3, cu_seqlens=cu_seqlens)
    return ttt.fast_weight_scan(
        z, v, w0, chunk_size=chunk_size, step_size=s, state=state, cu_seqlens=cu_seqlens,
        preserve_row_norm=True, return_state=True,
    )  # fmt: skip


def loop_call(batch, tokens, cu=None, dtype=torch.float64) -> Call:
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    tensors = {
        "x": randn(batch, tokens, D, dtype=dtype),
        "z": randn(batch, tokens, F, seed=1, dtype=dtype),
        "proj": randn(D, D, seed=2, dtype=dtype),
        "w0": randn(D, F, seed=3, dtype=dtype),
    }
    return Call(inner_loop, tensors, {"cu_seqlens": None if cu is None else torch.tensor(cu)})


@pytest.mark.parametrize("cu", [None, PACKED], ids=["dense", "packed"])
def test_composition_compiles(cu):
    """Packed, the number of chunks between the two ops is known to no one at compile time."""
    call = loop_call(2, 11, cu)
    compiled = torch.compile(inner_loop, fullgraph=True, backend="aot_eager")
    assert_same(results(Call(compiled, call.tensors, call.options)), results(call))


def test_composition_compiles_on_triton():
    """The choice is made inside the ops, where the compiler does not look."""
    call = loop_call(2, 11, dtype=torch.float32)
    call.tensors = {k: on_device(t) for k, t in call.tensors.items()}
    compiled = torch.compile(inner_loop, fullgraph=True, backend="aot_eager")
    with chosen_implementation("triton"):
        got = results(Call(compiled, call.tensors, call.options))
        assert_same(got, results(call))
    assert_close(got, results(call), 2e-5)


def test_composition_compiles_with_inductor():
    call = loop_call(2, 11, dtype=torch.float32)

    def loss(**inputs):
        y, state = inner_loop(**inputs)
        return torch.nn.functional.silu(y).transpose(1, 2), state

    compiled = torch.compile(loss, fullgraph=True)
    got, want = (results(Call(f, call.tensors, call.options)) for f in (compiled, loss))
    assert_close(got, want, 1e-5)


def counted(op):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(op, fullgraph=True, dynamic=True, backend=backend), graphs


def test_one_dynamic_graph_serves_many_lengths():
    compiled, graphs = counted(inner_loop)
    for tokens in (11, 12, 17, 33):
        call = loop_call(3, tokens)
        assert_same(results(Call(compiled, call.tensors, call.options)), results(call))
    assert len(graphs) == 1


def test_one_dynamic_graph_serves_many_packings():
    compiled, graphs = counted(inner_loop)
    for cu in (PACKED, [0, 4, 13, 13], [0, 1, 2, 30], [0, 10, 20, 30, 40]):
        call = loop_call(1, 0, cu)
        assert_same(results(Call(compiled, call.tensors, call.options)), results(call))
    assert len(graphs) == 1


def test_one_dynamic_graph_serves_many_chunk_sizes():
    compiled, graphs = counted(inner_loop)
    for chunk in (4, 5, 7, 11):
        call = loop_call(2, 33)
        call.options["chunk_size"] = chunk
        assert_same(results(Call(compiled, call.tensors, call.options)), results(call))
    assert len(graphs) == 1


def test_dynamic_aot():
    """Symbolic sizes through the fakes of forward and backward."""
    compiled = torch.compile(inner_loop, fullgraph=True, dynamic=True, backend="aot_eager")
    for cu, tokens in ((None, 11), (None, 18), (PACKED, 0), ([0, 4, 13, 13, 18], 0)):
        call = loop_call(3, tokens, cu)
        assert_same(results(Call(compiled, call.tensors, call.options)), results(call))


def test_changing_step_size_while_compiled():
    """Numbers that become symbols in a second compilation."""
    compiled = torch.compile(ttt.fast_weight_scan, fullgraph=True, backend="aot_eager")
    for lr in (0.3, 0.5, 0.7):
        call = scan_call(2, 11, step_size=lr)
        assert_same(results(Call(compiled, call.tensors, call.options)), results(call))


# Autocast


@pytest.mark.parametrize("name", CALLS)
def test_autocast(name):
    """z, v, w0 are cast; fast weights and step sizes are not; gradients come in the parameters' dtype."""
    call = all_calls(torch.float32)[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = results(call)
        double = results(CALLS[name])
    kept = ("state", "step_size", "weight", "row_scale")
    low = {k: t if k in kept else t.bfloat16() for k, t in call.tensors.items()}
    want = results(Call(call.op, low, call.options))
    for key, value in want.items():
        if key.startswith("out"):
            assert torch.equal(got[key], value) and got[key].dtype == value.dtype
        else:
            assert got[key].dtype == torch.float32 and torch.equal(got[key], value.float())
    assert_same(double, results(CALLS[name]))  # float64 is left alone


def test_autocast_dtypes_of_the_scan():
    call = scan_call(2, 11, dtype=torch.float32, state=True)
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("eager", "reference"):
            y, state = call(impl=impl)
            assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
            low = {k: call.tensors[k].bfloat16() for k in ("z", "v", "w0")}
            with torch.autocast("cpu", enabled=False):
                want = call(**low, impl=impl)
            assert torch.equal(y, want[0]) and torch.equal(state, want[1])
        with torch.autocast("cpu", enabled=False):
            assert call()[0].dtype == torch.float32


def test_autocast_compiled():
    call = loop_call(2, 11, dtype=torch.float32)
    compiled = torch.compile(inner_loop, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (results(Call(f, call.tensors, call.options)) for f in (compiled, inner_loop))
    assert_same(got, want)
    assert got["out0"].dtype == torch.bfloat16 and got["dw0"].dtype == torch.float32


# Checkpointing and functional transforms


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_checkpoint(name, reentrant):
    call = CALLS[name]
    names = list(call.tensors)

    def run(*tensors):
        return call(**dict(zip(names, tensors, strict=True)))

    leaves = call.leaves()
    outputs = checkpoint(run, *leaves.values(), use_reentrant=reentrant)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    live = [t for t in outputs if t is not None]
    directions = [randn(*t.shape, seed=50 + i) for i, t in enumerate(live)]
    torch.autograd.backward(live, directions)
    want = results(call)
    assert_same({f"d{k}": t.grad for k, t in leaves.items()},
                {f"d{k}": want[f"d{k}"] for k in leaves})  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_func_grad(name):
    call = CALLS[name]
    names, values = list(call.tensors), tuple(call.tensors.values())

    def loss(*tensors):
        outputs = call(**dict(zip(names, tensors, strict=True)))
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        live = [t for t in outputs if t is not None]
        directions = [randn(*t.shape, seed=50 + i) for i, t in enumerate(live)]
        return sum((t * d).sum() for t, d in zip(live, directions, strict=True))

    want = results(call)
    grads = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
    got = {f"d{k}": g for k, g in zip(names, grads, strict=True)}
    assert_same(got, {k: want[k] for k in got})
    value, vjp = torch.func.vjp(loss, *values)
    assert_same({k: g for k, g in zip(got, vjp(torch.ones_like(value)), strict=True)}, got)
