"""The described launches of the CUDA C++ kernels: their arithmetic, memory, and what they are made of."""

import re
from dataclasses import replace

import pytest
import torch
from emulated import GPU, cuda_kernels  # noqa: F401
from source_tree import ROOT

from ttt_kernels import _extension
from ttt_kernels.cli import report_predictions
from ttt_kernels.cli.bench_case import Case as Row
from ttt_kernels.cli.report_command import cuda_kernels as readable_kernels
from ttt_kernels.ops.cuda_launch import SM80, SM90
from ttt_kernels.testing import cuda_launches, roofline
from ttt_kernels.testing.cuda_compiled import CudaReport
from ttt_kernels.testing.cuda_launches import (
    AMPERE,
    HOPPER,
    NARROW,
    Blocks,
    Extension,
    forward_step,
    products_of,
    step_apply,
)
from ttt_kernels.testing.kernel_report import RESERVED_SHARED
from ttt_kernels.testing.kernel_survey import Case
from ttt_kernels.testing.roofline import MACHINES, Step, predict

pytest.importorskip("triton")  # its launches are recorded by the same file
D, F, C, T = 4096, 14336, 1024, 8192
LLAMA = Case("scan fwd", "llama", D, F, tokens=T, chunk_size=C, slots=False, impl="cuda")
EVEN = replace(LLAMA, d=3840, f=13824)  # multiples of every tile
ODD = replace(LLAMA, d=1032, f=3080, tokens=1500, chunk_size=200, batch=2)
H200 = MACHINES["H200"]


def recorded(case: Case, architecture: int = 90):
    from ttt_kernels.testing.triton_workloads import record_case

    return record_case(case, architecture)


def flops(case: Case, architecture: int = 90) -> float:
    return sum(launch.work.flops for launch in recorded(case, architecture).launches)


def report(kernel: str, tile: tuple = (), registers: int = 168, **changes) -> CudaReport:
    facts = dict(
        kernel=kernel, architecture=90, dtype="bf16", tile=tile, warps=4, stages=0, threads=128,
        registers=registers, stack=0, spill_stores=0, spill_loads=0, loop_spills=0, shared_memory=0,
        tensor_memory=0, dots=(), wgmma=0, tcgen05=0, mma_sync=0, cp_async=0, tma=0, load_bytes=(),
        store_bytes=(),
    )  # fmt: skip
    return CudaReport(**{**facts, **changes})


def reports(case: Case, **changes) -> list[CudaReport]:
    return [report(one.kernel, one.tile, **changes) for one in recorded(case).launches]


# --- arithmetic -----------------------------------------------------------------------------------
CHUNK = 2 * EVEN.d * EVEN.f * C  # one product of one chunk
CHUNKS = T // C


@pytest.mark.parametrize("architecture", [80, 90])
def test_tiles_add_up_to_the_formula(architecture):
    """Where the tiles divide the sizes: exactly the products of csrc/kernels/scan."""

    def chunks(operation: str, **changes) -> float:
        return flops(replace(EVEN, operation=operation, **changes), architecture) / CHUNK

    assert chunks("scan fwd") == 2 * CHUNKS - 1  # the last write is not wanted
    assert chunks("scan prefill") == 2 * CHUNKS
    # Training: dV, dZ's half of G and the write itself for all but the last chunk, which no token reads; dZ's
    # half of W and G for all; V^T Z once more to recompute the state, not before the first chunk.
    training = (2 * CHUNKS - 1) + 2 * (CHUNKS - 1) + 2 * CHUNKS + (CHUNKS - 2)
    assert chunks("scan fwd+bwd") == training
    assert chunks("scan fwd+bwd", preserve_row_norm=True) == training + CHUNKS  # dY^T Z for dr
    # One launch holds all rows of a batch.
    assert chunks("scan fwd", batch=2) == 2 * chunks("scan fwd")


def test_cut_tiles_are_counted_as_full():
    complete = ODD.batch * (ODD.tokens // ODD.chunk_size)
    formula = 2 * ODD.d * ODD.f * (ODD.batch * ODD.tokens + complete * ODD.chunk_size)
    for architecture in (80, 90):
        assert formula < flops(replace(ODD, operation="scan prefill"), architecture) < 2 * formula


def test_an_incomplete_chunk_is_read_but_not_written():
    tail = replace(EVEN, tokens=T + C // 2, operation="scan prefill")
    assert flops(tail) == flops(replace(EVEN, operation="scan prefill")) + CHUNK / 2
    backward = replace(tail, operation="scan fwd+bwd")
    whole = replace(backward, tokens=T)
    assert flops(backward) > flops(whole) + 3 * CHUNK / 2  # now the last complete chunk is read by somebody


def test_tiles_of_the_two_paths():
    hopper, ampere = (forward_step(p, Blocks(1, C, D, F), write=True) for p in (HOPPER, AMPERE))
    assert [(t.count, t.rounds, t.overlap) for t in hopper.work.tiles] == [(176, 0, True), (2400, 0, True)]
    assert [(t.count, t.rounds, t.overlap) for t in ampere.work.tiles] == [(256, 1, False), (3584, 1, False)]
    assert hopper.work.traffic == ampere.work.traffic == 12 * D * F + 2 * C * (F + 2 * D)
    apply, write = hopper.work.tiles
    assert (
        apply.loads == F // 64 * 28672 and write.loads == C // 64 * 28672
    )  # stages of 40 KB, 24 of them shared
    assert apply.tail == 2 * 128 * 192 and write.tail == 240 * 1024
    assert apply.tail_reads == 0 and write.tail_reads == 96 * 1024
    three = HOPPER.tiles(1, 3 * 128, 192, 64, 0)
    assert three.count == 4  # tiles come in pairs


def test_the_width_of_hopper_tiles():
    """Wide ones do more for a byte; narrow ones where few wide ones would leave multiprocessors idle."""
    assert products_of(SM80, 132, Blocks(1, C, D, F)) is AMPERE
    assert products_of(SM90, 132, Blocks(1, C, D, F)) is HOPPER
    assert products_of(SM90, 132, Blocks(1, C, 2560, 9728)) is HOPPER
    assert products_of(SM90, 132, Blocks(1, C, 1024, 3072)) is NARROW
    assert products_of(SM90, 132, Blocks(8, C, 1024, 3072)) is HOPPER


def test_decode():
    """csrc/kernels/step/step_apply.cu: rows of a warp, parts of F."""

    def versions(batch: int, tokens: int) -> list[tuple]:
        return [(launch.kernel, *dict(launch.tile).values())
                for launch in step_apply(132, Blocks(batch, tokens, D, F))]  # fmt: skip

    assert versions(1, 1) == [("step_apply_matvec_kernel", 2, 1)]
    assert versions(2, 3) == [("step_apply_matvec_kernel", 4, 4)]
    assert versions(1, 8) == [("step_apply_matvec_kernel", 2, 8)]
    assert versions(1, 9) == [("step_apply_tokens_kernel",), ("step_apply_sum_kernel",)]
    assert versions(1, 2048) == [("step_apply_tokens_kernel",)]  # 512 tiles fill the GPU
    tiles, sums = step_apply(132, Blocks(1, 128, D, F))
    assert tiles.work.flops == 2 * D * F * 128 and tiles.work.tiles[0].count == 8 * 32
    assert sums.work.traffic == 128 * D * (4 * 8 + 2)
    update = recorded(replace(LLAMA, operation="decode update", batch=3)).launches
    assert [u.work.flops for u in update] == [3 * 2 * D * F * C]
    assert update[0].work.traffic == 3 * (8 * D * F + 2 * C * (D + F))


def test_step_sizes():
    spectral = recorded(replace(LLAMA, operation="step size fwd"))
    names = [launch.kernel.removeprefix("step_size_fwd_") for launch in spectral.launches]
    once = ["gram_kernel", "mean_kernel", *["iterate_kernel"] * 11, "spectral_kernel"]
    assert names == once * (len(names) // len(once))
    triangle = (C // 128) * (C // 128 + 1) // 2
    assert flops(replace(LLAMA, operation="step size fwd")) == CHUNKS * triangle * 2 * 128**2 * (D + F)
    clipped = recorded(replace(LLAMA, operation="clipped step size fwd")).launches
    assert {launch.kernel for launch in clipped} == {"step_size_fwd_gram_kernel", "step_size_fwd_clip_kernel"}


def test_backwards_without_kernels_are_library_products():
    for operation in ("step size bwd", "clipped step size bwd", "decode apply bwd"):
        found = recorded(replace(LLAMA, operation=operation, tokens=C))
        assert not found.launches and sum(call.flops for call in found.library) > 0, operation


# --- memory, and the border -----------------------------------------------------------------------
def test_memory_is_that_of_the_python_code():
    """In float32 weights, beyond results: state and two shadows; with gradients saved state, G and two
    shadows, less dw0."""
    weight = 4 * D * F
    for operation, wanted in (("scan fwd", 2), ("scan fwd+bwd", 2.5)):
        extra = recorded(replace(LLAMA, operation=operation)).extra_bytes / weight
        assert wanted <= extra < wanted + 0.01


def test_workspaces_are_those_of_the_library(cuda_kernels):  # noqa: F811
    library, asked = _extension.load(), []

    class Both(Extension):
        def compare(self, name: str, arguments: dict) -> int:
            mine = getattr(Extension, name)(self, **arguments)
            assert mine == getattr(library, name)(**arguments), name
            asked.append(name)
            return mine

        def scan_forward(self, **arguments):
            names = "y y_stride state write_last shadow_0 shadow_1 norms_0 norms_1 w0_norms".split()
            call = {k: v for k, v in arguments.items() if k not in names}
            first = cuda_launches._blocks(*(call[k] for k in ("offsets", "chunk", "tokens", "d", "f")))[0]
            mine = products_of(call["path"], self.processors, first).columns
            assert mine == library.scan_tile_columns(**call)
            asked.append(f"scan_tile_columns {mine}")

        def scan_backward_workspace(self, **arguments):
            # The address of a meta tensor is 0, which the library would take for none.
            return self.compare("scan_backward_workspace", {**arguments, "step_size": 256})

        def step_size_workspace(self, **arguments):
            return self.compare("step_size_workspace", arguments)

        def step_apply_workspace(self, **arguments):
            return self.compare("step_apply_workspace", arguments)

    emulated = 2  # csrc/emulation/control.h
    processors = torch.cuda.get_device_properties(0).multi_processor_count if GPU else emulated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_launches, "Extension", lambda _: Both(processors))
        for case in (LLAMA, ODD, replace(ODD, preserve_row_norm=True), replace(ODD, d=128, f=128)):
            for operation in ("scan fwd+bwd", "step size fwd", "decode apply"):
                recorded(replace(case, operation=operation, tokens=min(case.tokens, 2000)))
    columns = {"scan_tile_columns 128", "scan_tile_columns 192"}
    assert set(asked) == {"scan_backward_workspace", "step_size_workspace", "step_apply_workspace", *columns}


def test_packed_sequences_are_refused():
    with pytest.raises(NotImplementedError, match="sequences of one length"):
        recorded(replace(ODD, batch=1, sequences=3))
    assert _extension.load.__module__ == "ttt_kernels._extension"  # given back


def test_every_kernel_is_described():
    sources = (ROOT / "csrc" / "kernels").rglob("*.cu*")
    text = "".join(p.read_text(encoding="utf-8") for p in sources)
    written = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)) - {"device_image_kernel"}
    operations = ("scan fwd+bwd", "step size fwd", "clipped step size fwd", "decode apply", "decode update")
    cases = [replace(LLAMA, operation=o, preserve_row_norm=o.startswith("scan")) for o in operations]
    cases += [replace(LLAMA, operation="decode apply", tokens=n) for n in (1, 16)]
    found = {launch.kernel for a in (80, 90) for case in cases for launch in recorded(case, a).launches}
    assert found == written


# --- with what was compiled -----------------------------------------------------------------------
def test_blocks_come_from_registers_and_shared_memory():
    [one] = cuda_launches.survey([replace(LLAMA, operation="decode update")], 90, [
        report("step_update_kernel", registers=64),
        report("step_update_kernel", registers=234, mma_sync=64, shared_memory=66560),
        report("step_update_kernel", registers=255, dtype="f16"),
    ])  # fmt: skip
    assert one.kernels[0].registers == 234  # of those for bfloat16, the one with fewest blocks
    [step] = one.steps
    assert step.resident == 65536 // (240 * 128) == 233472 // (66560 + RESERVED_SHARED) - 1 == 2
    assert (step.host, step.speed) == (roofline.HOST_KERNEL, roofline.MMA_SYNC[90])
    fast = cuda_launches.survey([one.case], 90, [report("step_update_kernel", wgmma=4)])
    assert fast[0].steps[0].speed == 1.0
    assert fast[0].predict(H200).device < one.predict(H200).device
    with pytest.raises(LookupError, match="step_update_kernel {} is not in the compiled library"):
        cuda_launches.survey([one.case], 90, [])


def test_a_row_of_the_report():
    row = Row("scan", "even", EVEN.d, EVEN.f, tokens=T, chunk_size=C, dtype="bfloat16", device="cuda")
    [mine] = [r for r in report_predictions.rows([row]) if r.impl == "cuda"]
    compiled = cuda_launches.survey(mine.launches, 90, reports(mine.launches[0], threads=384, wgmma=4))
    _, line = report_predictions.records([mine], compiled, H200)
    assert line["impl"] == "cuda" and line["largest"]["name"] == "sm90_scan_fwd_step_kernel"
    assert line["largest"]["registers"] == 168 and line["largest"]["resident_blocks"] == 1
    assert line["counted_flops"] == pytest.approx((2 * CHUNKS - 1) * CHUNK, rel=1e-5)
    assert line["extra_weights"] == pytest.approx(2.0, abs=0.01)
    launches = (
        8 * predict(H200, [Step("", forward_step(HOPPER, Blocks(1, C, EVEN.d, EVEN.f), True).work, 1)]).device
    )
    assert 0.9 * launches < line["milliseconds"] / 1e3 < 1.1 * launches  # the last writes nothing
    float32 = replace(row, dtype="float32")
    assert "cuda" not in {r.impl for r in report_predictions.rows([float32])}


def test_without_a_library_the_command_says_so(monkeypatch, tmp_path):
    def absent():
        raise ImportError("ttt_kernels._C: not built")

    monkeypatch.setattr(_extension, "load", absent)
    assert readable_kernels() == ({}, "ttt_kernels._C: not built")
    monkeypatch.setattr(_extension, "load", lambda: Extension(132))
    assert readable_kernels() == ({}, "ttt_kernels._C is emulated and holds no machine code")
    compiled = type("Module", (), {"emulated": False, "__file__": "x.so"})
    monkeypatch.setattr(_extension, "load", lambda: compiled)
    monkeypatch.setattr(cuda_launches.cuda_compiled, "storage_bytes", lambda csrc: {})
    monkeypatch.setattr(cuda_launches.cuda_compiled, "read_library", lambda *_: {"sm_90a": []})
    assert readable_kernels() == ({90: []}, "the library has no image sm_80, sm_100a")

    wanted = [Row("scan", "s", 64, 128, tokens=128, chunk_size=64, dtype="bfloat16", device="cuda")]
    monkeypatch.setattr(report_predictions, "cases", lambda: wanted)
    monkeypatch.setattr(report_predictions, "survey", lambda cases, *_: [])
    monkeypatch.setattr(report_predictions, "records", lambda rows, *_: [{"impl": r.impl} for r in rows])
    for path in report_predictions.write(tmp_path, 1, {}):
        text = path.read_text()
        assert "triton" in text and "cuda" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_calls_is_the_op_itself(dtype):
    """A call that ops/scan/cuda.py makes otherwise, or no longer, is an error here."""
    with cuda_launches.record(90) as launches:
        from ttt_kernels.ops.scan import cuda

        z, v = (torch.empty(2, 96, n, dtype=getattr(torch, dtype), device="meta") for n in (128, 64))
        w0 = torch.empty(64, 128, dtype=z.dtype, device="meta")
        y, _ = cuda.forward(z, v, w0, None, 0.5, None, None, 32, False, False, False)
    assert y.shape == (2, 96, 64) and [launch.kernel for launch in launches] == [
        "scan_round_kernel", *["sm90_scan_fwd_step_kernel"] * 3,
    ]  # fmt: skip
