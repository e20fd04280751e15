"""The fused step sizes: against the formula on G in float64, and what must hold without one.

Interpreted where there is no GPU, compiled where there is one.
"""

from collections import Counter

import pytest
import torch
from helpers import Call, assert_close, assert_same, randn, results
from test_step_size import LENGTHS, PACKINGS, C, D, F

import ttt_kernels as ttt
from ttt_kernels.ops.step_size import eager, heuristics, reference, registration
from ttt_kernels.testing.kernel_report import LIMITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# One iteration unless a test is about them: programs are slow where they are interpreted.
OPS = {
    "spectral": (ttt.spectral_step_size, reference.spectral, {"iterations": 1}),
    "clipped": (ttt.clipped_step_size, reference.clipped, {"max_norm": 10.0}),
}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("TTT_KERNELS_IMPL", "triton")


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def make(op, batch=2, tokens=13, *, cu=None, d=D, f=F, dtype=torch.float32, **options) -> Call:
    batch, tokens = (batch, tokens) if cu is None else (1, cu[-1])
    function, _, parameter = OPS[op]
    tensors = {
        "z": randn(batch, tokens, f, dtype=dtype).to(DEVICE),
        "v": randn(batch, tokens, d, seed=1, dtype=dtype).to(DEVICE),
    }
    cu_seqlens = None if cu is None else torch.tensor(cu, device=DEVICE)
    fixed = {"chunk_size": C, "cu_seqlens": cu_seqlens, "lr": 0.3}
    return Call(function, tensors, {**fixed, **parameter, **options})


def compare(op: str, call: Call, bound: float = 2e-5) -> dict[str, torch.Tensor]:
    """The results, after a comparison with the formula on the same numbers in float64."""
    got, dtype = results(call), call.tensors["z"].dtype
    exact = Call(OPS[op][1], {k: t.double() for k, t in call.tensors.items()}, call.options)
    assert got["out0"].dtype == torch.float32 and got["dz"].dtype == got["dv"].dtype == dtype
    if not got["out0"].any():  # no complete chunk: the reference has no graph
        assert not exact().any() and not got["dz"].any() and not got["dv"].any()
        return got
    want = {k: t.double() for k, t in results(exact).items()}
    got64 = {k: t.double() for k, t in got.items()}
    assert_close({"s": got64.pop("out0")}, {"s": want.pop("out0")}, bound)
    assert_close(got64, want, max(bound, torch.finfo(dtype).eps))
    return got


@pytest.mark.parametrize(("batch", "tokens"), [(0, 9), (1, 0), (7, C), *((2, t) for t in LENGTHS[1:])])
def test_dense(op, batch, tokens):
    got = compare(op, make(op, batch, tokens))["out0"]
    assert got.shape == (batch, -(-tokens // C))
    assert got[:, : tokens // C].all() and not got[:, tokens // C :].any()


@pytest.mark.parametrize("cu", PACKINGS, ids=str)
def test_packed(op, cu):
    compare(op, make(op, cu=cu))


def test_no_sequences(op):
    assert make(op, 1, 0)(cu_seqlens=torch.tensor([0], device=DEVICE)).shape == (1, 0)


@pytest.mark.parametrize("chunk", [1, 2, 7, 8])
def test_chunk_sizes(op, chunk):
    compare(op, make(op, 1, 7, chunk_size=chunk))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [16, 33, pytest.param(300, marks=pytest.mark.gpu)])
def test_several_tiles(op, chunk, dtype):
    """Chunks, keys and values longer than a tile, and not multiples of one."""
    width = {"d": 40, "f": 72} if chunk < 300 else {"d": 520, "f": 1100}
    # A gradient large enough for float16, which the formula's is not rounded to.
    call = make(op, 1, 2 * chunk + 1, chunk_size=chunk, dtype=dtype, lr=1e3, **width)
    got = compare(op, call)
    # Rounded once: float32 factors are not rounded to 16 bits on the way.
    exact = results(Call(OPS[op][1], {k: t.double() for k, t in call.tensors.items()}, call.options))
    if dtype != torch.float32:
        for name in ("dz", "dv"):
            assert (got[name] != exact[name].to(dtype)).double().mean() < 0.02


def test_groups(op, monkeypatch):
    """Groups of bounded memory, with more chunks than a group."""
    clean = results(make(op, cu=[0, 5, 5, 17, 20]))
    monkeypatch.setattr(heuristics, "GRID_LIMIT", 2)
    assert_same(results(make(op, cu=[0, 5, 5, 17, 20])), clean)


@pytest.mark.parametrize("iterations", [2, 5, 9])
def test_iterations(iterations):
    """9: more vectors than one program of the backward takes."""
    compare("spectral", make("spectral", 1, 4, iterations=iterations))


@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 1e6])
def test_max_norms(max_norm):
    compare("clipped", make("clipped", max_norm=max_norm))


def test_extreme_max_norms():
    """Squares of these leave float32: "never clip", and clip to almost nothing."""
    call = make("clipped", 1, 8)
    never = results(call, max_norm=1e25)
    assert (never["out0"] == 0.3).all() and not never["dz"].any() and not never["dv"].any()
    tiny = call(max_norm=1e-25)
    assert torch.allclose(tiny * 1e25, call(max_norm=1e-3) * 1e3, rtol=1e-5)


def test_zero_chunks(op):
    """Nothing to write: the floor of sigma, no clipping; finite values, no gradient."""
    for name in ("z", "v"):
        call = make(op, 2, 9)
        call.tensors[name][:, :C] = 0
        got = compare(op, call)
        expected = torch.full((2,), 0.3 / 1e-6 if op == "spectral" else 0.3, device=DEVICE)
        assert torch.allclose(got["out0"][:, 0], expected)
        assert not got["dz"][:, :C].any() and not got["dv"][:, :C].any()


def test_norm_at_its_floor():
    """The column mean of G is all but 0, so that its norm is the constant eps; G itself is not small."""
    call = make("spectral", 2, 8, d=2, iterations=2)  # one would be ill-conditioned
    size = randn(2, 8, seed=3, dtype=torch.float32).to(DEVICE).abs().add(1) / 32
    nearly = torch.nextafter(size, torch.full_like(size, 1))
    call.tensors.update(z=call.tensors["z"] / 32, v=torch.stack([size, -nearly], -1))
    z, v = (t.double().unflatten(1, (-1, C)) for t in call.tensors.values())
    assert (torch.linalg.vector_norm((v.mT @ z).mean(-2), dim=-1) < 1e-8).all()
    compare("spectral", call)


def test_two_norms_at_their_floor():
    """The gradient of a norm that is the constant eps shows only where the next one is it too, barely, and
    sigma is not: against the rule on Gram matrices in float64."""
    from ttt_kernels.ops.step_size import triton_bwd
    from ttt_kernels.ops.step_size.gram_rules import Spectral

    z, v = make("spectral", 1, C).tensors.values()
    means = randn(C, seed=4, dtype=torch.float32).to(DEVICE)
    means *= 0.0095e-8 / (z[0].t() @ means).norm()
    v *= 0.99e-8 / (v[0].t() @ z[0] @ (z[0].t() @ means / 1e-8)).norm()
    first, ds = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    got = torch.empty_like(z), torch.empty_like(v)
    rule = Spectral(1e-6, 1)
    triton_bwd.spectral_group(ds, z, v, *got, first, C, means, rule)
    keys, values = z.double(), v.double()
    grams = (keys @ keys.mT, values @ values.mT, means.double()[None])
    assert 0.5e-6 < rule(*grams) < 1, "sigma at its floor"
    dkz, dkv, dmean = rule.backward(ds.double(), *grams)
    dz, dv = (dkz + dkz.mT) @ keys, (dkv + dkv.mT) @ values + dmean[..., None] / D
    assert_close({"dz": got[0].double(), "dv": got[1].double()}, {"dz": dz, "dv": dv}, 1e-5)


def test_large_float16():
    """Gram matrices beyond the range of float16."""
    for name in OPS:
        call = make(name, 1, 8, dtype=torch.float16, lr=1e7)
        call.tensors["z"] *= 300
        call.tensors["v"] *= 200
        compare(name, call)


@pytest.mark.parametrize("cu", [None, [0, 5, 5, 13]], ids=str)
def test_chunks_do_not_see_one_another(op, cu):
    call = make(op, 1, 13, cu=cu)
    clean = results(call)
    for name in ("z", "v"):
        dirty = {**call.tensors, name: call.tensors[name].clone()}
        dirty[name][:, 6] = float("nan")
        got = results(Call(call.op, dirty, call.options))
        hit = torch.zeros(4, dtype=torch.bool, device=DEVICE)
        hit[1 if cu is None else 2] = True
        assert torch.equal(got["out0"][0].isnan(), hit)
        assert torch.equal(got["out0"][0][~hit], clean["out0"][0][~hit])
        a, b = (4, 8) if cu is None else (5, 9)
        for grad in ("dz", "dv"):
            assert got[grad][:, a:b].isnan().any()
            assert torch.equal(got[grad][:, :a], clean[grad][:, :a])
            assert torch.equal(got[grad][:, b:], clean[grad][:, b:])


def test_incomplete_chunk_is_not_read(op):
    call = make(op, 1, 9)
    dirty = {k: t.clone() for k, t in call.tensors.items()}
    for tensor in dirty.values():
        tensor[:, 8] = float("nan")
    assert_same(results(Call(call.op, dirty, call.options)), results(call))


def test_repeatable_and_every_element_written(op):
    for call in (make(op, 1, 9), make(op, 1, 8)):
        clean = results(call)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all(), "the poison does not work"
            assert_same(results(call), clean)
        finally:
            torch.use_deterministic_algorithms(False)


def test_which_implementation_runs(op, monkeypatch):
    call = make(op, 1, 8)
    formula = Call(OPS[op][1], call.tensors, call.options)
    monkeypatch.setenv("TTT_KERNELS_IMPL", "reference")
    assert torch.equal(call(), formula())
    monkeypatch.setenv("TTT_KERNELS_IMPL", "triton")
    with pytest.raises(NotImplementedError, match=f"{op}_step_size here.* not float64"):
        call(**{k: t.double() for k, t in call.tensors.items()})
    for table in (registration.FORWARD, registration.BACKWARD):
        monkeypatch.setitem(table, "triton", lambda *args: pytest.fail("not the eager op"))
    for impl in ("eager", "auto"):
        monkeypatch.setenv("TTT_KERNELS_IMPL", impl)
        dtype = torch.float64 if DEVICE == "cuda" and impl == "auto" else torch.float32
        results(make(op, 1, 8, dtype=dtype))
    assert registration.FORWARD["eager"] is eager.forward


# Choices


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(architecture, itemsize):
    limit = LIMITS[architecture].shared_per_block
    for chunk, chunks in ((1, 1), (64, 512), (1000, 3), (1024, 32), (4096, 1)):
        gram = heuristics.gram_tiles(architecture, itemsize, chunk, chunks)
        assert gram.stages * gram.k * 2 * gram.rows * itemsize <= limit
        padded = -(-chunk // gram.rows) * gram.rows
        rows = heuristics.iterate_tiles(architecture, padded)
        assert padded % rows.rows == padded % rows.columns == 0
        clip = heuristics.clip_tiles(architecture, itemsize, chunk)
        assert clip.stages * clip.k * (4 * clip.rows + itemsize * clip.columns) <= limit
        project = heuristics.project_tiles(architecture, itemsize)
        assert padded % project.k == padded % clip.k == 0, "they read scratch in whole tiles"
    assert project.stages * project.k * (4 * project.rows + itemsize * project.columns) <= limit


def test_tiles_by_size():
    assert heuristics.gram_tiles(90, 2, 1024, 32).rows == 128
    assert heuristics.gram_tiles(90, 2, 1024, 1).rows == 64, "a tile for every multiprocessor"
    assert heuristics.gram_tiles(90, 2, 64, 512).rows == 64, "no longer than a chunk"
    assert heuristics.gram_tiles(103, 2, 1024, 32) == heuristics.gram_tiles(100, 2, 1024, 32)


@pytest.mark.parametrize("chunks", [0, 1, 31, 32, 33, 100])
def test_group_sizes(chunks):
    size = heuristics.group_size(chunks, heuristics.GROUP_BYTES // 32)
    groups = -(-chunks // size)
    assert 1 <= size <= 32 and groups == -(-chunks // 32)
    assert heuristics.group_size(chunks, 1 << 40) == 1


@pytest.mark.parametrize(
    ("d", "f", "forward", "training"),
    [(4096, 14336, 0.51, 0.42), (2560, 9728, 0.58, 0.48), (1024, 3072, 1.02, 0.85)],
)
def test_why_there_is_no_matvec_form(d, f, forward, training):
    """The ratios that the docstring states; only far longer chunks would turn them."""
    gram, matvec = heuristics.seconds_per_token(1024, d, f)
    assert gram / matvec == pytest.approx(forward, abs=0.01)
    gram_back, matvec_back = heuristics.seconds_per_token(1024, d, f, backward=True)
    assert (gram + gram_back) / (matvec + matvec_back) == pytest.approx(training, abs=0.01)
    assert heuristics.seconds_per_token(4096, d, f)[0] > matvec


def test_launches_of_a_model(monkeypatch):
    """What one call at the Llama shape launches, from a recording with tensors without data; with room
    for all chunks forward, and for half of them backward."""
    monkeypatch.setattr(heuristics, "GROUP_BYTES", 256 << 20)
    from ttt_kernels.ops.step_size import gram_rules, triton_bwd, triton_fwd
    from ttt_kernels.ops.triton_launch import record

    z = torch.empty(1, 32768, 14336, dtype=torch.bfloat16, device="meta")
    v = torch.empty(1, 32768, 4096, dtype=torch.bfloat16, device="meta")

    def launches(function, *args) -> Counter:
        with record(90) as recorded:
            function(*args)
        return Counter(launch.kernel.fn.__name__.removeprefix("step_size_") for launch in recorded)

    spectral, clip = gram_rules.Spectral(0.3, 5), gram_rules.Clipped(0.3, 1.0)
    steps = torch.empty(1, 32, device="meta")
    assert launches(triton_fwd.forward, z, v, 1024, None, spectral) == {
        "fwd_gram_kernel": 1, "fwd_iterate_kernel": 11,
    }  # fmt: skip
    assert launches(triton_fwd.forward, z, v, 1024, None, clip) == {"fwd_gram_kernel": 1}
    per_group = {
        "fwd_gram_kernel": 1, "fwd_iterate_kernel": 11, "bwd_iterate_kernel": 10,
        "bwd_project_kernel": 2, "bwd_expand_kernel": 2,
    }  # fmt: skip
    backward = launches(triton_bwd.backward, steps, z, v, 1024, None, spectral)
    assert backward == {k: 2 * n for k, n in per_group.items()}
    assert launches(triton_bwd.backward, steps, z, v, 1024, None, clip) == {
        "fwd_gram_kernel": 1, "bwd_clip_kernel": 2,
    }  # fmt: skip
