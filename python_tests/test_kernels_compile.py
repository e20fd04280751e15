"""Every Triton kernel compiled ahead of time, with the tiles it would run with, and its machine code read."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ttt_kernels import _config
from ttt_kernels.cli import kernels_report
from ttt_kernels.cli.kernels_command import cases
from ttt_kernels.cli.main import main
from ttt_kernels.testing.kernel_report import ACCEPTED, Accepted, KernelReport, complaints
from ttt_kernels.testing.kernel_survey import Case, Compiled, survey
from ttt_kernels.testing.roofline import MACHINES, LibraryCall, Tiles, Work

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ARCHITECTURES = (80, 90, 100)
LARGE = Case("scan fwd+bwd", "llama-3.1-8b", 4096, 14336, preserve_row_norm=True)
MIDDLE = Case("scan fwd+bwd", "qwen3-4b", 2560, 9728, chunk_size=64, carried=True)
SMALL = Case("scan fwd+bwd", "qwen3-0.6b", 1024, 3072)
# Sizes that no tile divides, sequences of unequal length, chunks that no tile of tokens divides.
ODD = replace(SMALL, shape="odd", d=1008, f=3024, tokens=5000, chunk_size=100, sequences=3, carried=True)
CASES = [
    LARGE,
    replace(LARGE, chunk_size=64),
    MIDDLE,
    SMALL,
    replace(SMALL, operation="scan fwd", chunk_size=64, preserve_row_norm=True),
    replace(LARGE, operation="step size bwd"),
    replace(SMALL, operation="clipped step size bwd", chunk_size=64),
    replace(SMALL, operation="next-token target fwd"),
    replace(SMALL, operation="next-token target bwd"),
    replace(SMALL, operation="conv target bwd"),
    replace(LARGE, operation="decode apply", tokens=1),
    replace(SMALL, operation="decode apply", tokens=48, batch=2),
    replace(SMALL, operation="decode apply bwd", tokens=48, batch=2, preserve_row_norm=True),
    replace(SMALL, operation="decode apply bwd", tokens=1),
    replace(LARGE, operation="decode update", tokens=1),
]
# IEEE float32 products have no tensor cores; what counts is that the tiles fit.
FLOAT32 = [
    replace(case, dtype="float32")
    for case in (
        replace(SMALL, preserve_row_norm=True),
        replace(SMALL, operation="scan fwd", chunk_size=64, preserve_row_norm=True),
        replace(SMALL, operation="step size bwd"),
        replace(SMALL, operation="decode apply", tokens=48, batch=2),
        replace(LARGE, operation="decode update", tokens=1),
    )
]
# Odd sizes and IEEE float32 must compile and fit; they need not be fast.
SLOW = Accepted(spills=10**6, loop_spills=10**6, wide_loads=0.0)
# What multiplies tiles of at least 64 rows: without its own matrix instructions a kernel would be slow.
PRODUCTS = (
    "scan_fwd_step_kernel", "scan_fwd_scores_kernel", "scan_fwd_rescale_kernel", "scan_bwd_enter_kernel",
    "scan_bwd_leave_kernel", "scan_bwd_token_kernel", "scan_bwd_scores_kernel", "scan_bwd_read_kernel",
    "scan_bwd_rescale_kernel",
    "step_size_fwd_gram_kernel", "step_size_bwd_clip_kernel", "step_apply_tokens_kernel",
    "step_apply_bwd_pool_kernel", "step_update_kernel",
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    everything = survey(CASES, ARCHITECTURES)
    return [*everything, *survey([*FLOAT32, ODD], (90,))]


def reports(compiled: list[Compiled], architecture: int) -> list[KernelReport]:
    found = (r for one in compiled if one.architecture == architecture for r in one.kernels)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_are_as_they_should_be(compiled, architecture):
    slow = {r for one in compiled if one.case in (ODD, *FLOAT32) for r in one.kernels}
    found = reports(compiled, architecture)
    wrong = [text for r in found for text in complaints(r, SLOW if r in slow else None)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_use_the_architecture_s_own_instructions(compiled, architecture, kernel):
    """`complaints` looks at kernels that could; these must be among them."""
    mine = [r for r in reports(compiled, architecture) if r.kernel == kernel and r.wants_tensor_cores]
    assert mine
    assert all((r.mma_sync, r.wgmma, r.tcgen05)[ARCHITECTURES.index(architecture)] for r in mine)


def test_loads_of_the_state_run_ahead(compiled):
    """Copies of whole tiles before the loop, not only in it: what they load must not depend on step sizes."""
    names = ("scan_bwd_enter_kernel", "scan_bwd_leave_kernel")
    mine = [r for r in reports(compiled, 90) if r.kernel in names and r.tma]
    assert {dict(r.tile).get("SUPER") for r in mine} == {None, False, True}
    assert all(r.tma >= 2 * r.stages for r in mine)


def test_every_kernel_is_compiled_and_has_a_cost(compiled):
    from ttt_kernels.testing.kernel_costs import COSTS
    from ttt_kernels.testing.triton_workloads import kernels

    for architecture in ARCHITECTURES:
        assert {r.kernel for r in reports(compiled, architecture)} == set(kernels())
    assert set(COSTS) == set(kernels())
    assert set(ACCEPTED) <= set(kernels()) and all(a.why for a in ACCEPTED.values())


def test_a_launch_does_what_the_method_needs(compiled):
    """The FLOPs of all launches of a scan add up to the method's, and little more."""
    for one in compiled:
        case, machine = one.case, MACHINES["H200"]
        if one.architecture != 90 or case not in (LARGE, SMALL):
            continue
        method = 14 * case.d * case.f * case.tokens  # docs/method.md, less the last write
        counted = one.predict(machine).flops
        recomputed = 2 if case.preserve_row_norm else 0  # dY^T Z once more, for the norms' gradient
        recomputed += 2  # V^T Z once more, for the step size's gradient and the state before it
        assert 0.95 * method < counted < 1.02 * (14 + recomputed) / 14 * method


def test_memory_is_counted(compiled):
    """Extra memory of a forward: the float32 state and two rounded copies, some partial sums. With a
    backward: the state, in the memory where the forward has saved it, G and two rounded copies, less dw0,
    and what super-chunks need."""
    forward = next(o for o in survey([replace(SMALL, operation="scan fwd")], (90,)))
    weight = 4 * SMALL.d * SMALL.f
    assert 2 * weight <= forward.extra_bytes < 2.1 * weight
    for one in compiled:
        if one.case in (LARGE, replace(LARGE, chunk_size=64), MIDDLE, SMALL):
            most = 2.6 if one.case.chunk_size == 1024 else 2.8
            assert 2.5 <= one.extra_bytes / (4 * one.case.d * one.case.f) < most


# --- the tool itself --------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=ARCHITECTURES)
def judged(request) -> dict:
    """`compiled_kernels.py`: kernels that are good, spill, are too large, and load element by element."""
    program = Path(__file__).with_name("compiled_kernels.py")
    command = [sys.executable, str(program), str(request.param)]
    environment = {**_config.compiling_environment(), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_good_kernel_passes(judged):
    good = judged["facts"]["good"]
    assert not good["complaints"]
    assert good["dots"] == [[128, 128, 64, "bf16"]]
    assert good["native"] > 0
    assert good["wide_loads"] == 1
    assert good["resident_blocks"] == 2


@pytest.mark.parametrize(
    ("variant", "words"),
    [("spilling", "spills"), ("too large", "bytes of shared memory, at most"), ("narrow", "only 0%")],
)
def test_a_bad_kernel_is_refused(judged, variant, words):
    assert any(words in text for text in judged["facts"][variant]["complaints"])


def test_what_does_not_fit_is_not_resident(judged):
    assert judged["facts"]["too large"]["resident_blocks"] == 0


def test_equal_launches_are_compiled_once(judged):
    assert judged["compiled once"]


def test_interpreting_processes_compile_nothing():
    from ttt_kernels.ops.triton_launch import interpreted
    from ttt_kernels.testing.triton_compile import compile_launches

    if not interpreted():
        pytest.skip("this process compiles")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launches([], 90)


REPORT = KernelReport(
    kernel="some_kernel", architecture=90, dtype="bf16", tile=(("BLOCK_M", 128),), warps=8, stages=3,
    threads=256, registers=128, stack=0, spill_stores=0, spill_loads=0, loop_spills=0,
    shared_memory=98304, tensor_memory=0, dots=((128, 128, 64, "bf16"),), wgmma=4, tcgen05=0, mma_sync=0,
    cp_async=24, tma=0, load_bytes=((4, 8), (16, 384)), store_bytes=((16, 128),),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 2),
        ({"registers": 129}, 1),  # in units of 256 a warp: 136
        ({"registers": 64}, 2),  # shared memory
        ({"registers": 64, "shared_memory": 32768}, 4),  # 65536 / (64 * 256)
        ({"registers": 16, "shared_memory": 0}, 8),  # 2048 threads
        ({"registers": 16, "shared_memory": 0, "threads": 32}, 32),
        ({"shared_memory": 232448}, 1),
        ({"shared_memory": 232449}, 0),
        ({"architecture": 100, "tensor_memory": 512, "shared_memory": 1024}, 1),
        ({"architecture": 80, "shared_memory": 83000}, 1),
    ],
)
def test_resident_blocks(change, blocks):
    assert replace(REPORT, **change).resident_blocks == blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_loads": 4}, "spills 0 + 4 bytes"),
        ({"loop_spills": 4}, "spills 4 bytes in a loop that multiplies"),
        ({"wgmma": 0}, "no wgmma"),
        ({"wgmma_waits": 4}, "wgmma is serialised: 4 waits for 4 products"),
        ({"mma_sync": 2}, "2 products by mma.sync of sm_80 beside wgmma"),
        ({"architecture": 100, "tensor_memory": 513}, "513 columns of tensor memory, at most 512"),
        ({"architecture": 100}, "no tcgen05"),
        ({"architecture": 80}, "no mma.sync"),
        ({"load_bytes": ((4, 384), (16, 380))}, "only 50% of the loaded bytes"),
        ({"threads": 1024, "registers": 128}, "not one block fits"),
    ],
)
def test_complaints(change, words):
    assert not complaints(REPORT)
    bad = replace(REPORT, **change)
    assert any(words in text for text in complaints(bad))


def test_second_parts_are_named():
    tile = (("BLOCK_D", 128), ("MORE_D", 0), ("BLOCK_F", 128), ("MORE_F", 64), ("BLOCK_K", 32))
    assert replace(REPORT, tile=tile).block_sizes == "D128 F128+64 K32"


def test_what_is_accepted_has_a_bound():
    serialised = replace(REPORT, wgmma_waits=4)
    assert complaints(serialised) and not complaints(serialised, Accepted(serialised=True))
    spilling = replace(REPORT, spill_stores=8, spill_loads=8, loop_spills=4)
    assert not complaints(spilling, Accepted(spills=16, loop_spills=4))
    assert len(complaints(spilling, Accepted(spills=15, loop_spills=3))) == 2


# --- the command ------------------------------------------------------------------------------------
def fake_survey(reports: tuple[KernelReport, ...]):
    """A survey without a compiler: every case launches the given kernels, on each architecture."""
    work = Work((Tiles(64, 1e9, 1e6, 1e5),), 1e8)

    def survey(cases, architectures, processes):
        calls = (LibraryCall("torch.mm", 1e9, 1e6),)
        return [
            Compiled(case, a, tuple((replace(r, architecture=a), work) for r in reports), calls, 4096)
            for a in architectures
            for case in cases
        ]

    return survey


def test_the_command_writes_all_three(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ttt_kernels.cli.kernels_command.survey", fake_survey((REPORT,)))
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{kernels_report.BEGIN}\nold\n{kernels_report.END}\nafter\n")
    arguments = ["kernels", "--architectures", "90", "--json", str(tmp_path / "k.json")]
    assert main([*arguments, "--markdown", str(document)]) == 0
    shown = capsys.readouterr().out
    assert "some" in shown and "4 wgmma" in shown and "Predicted, not measured" in shown
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "llama-3.1-8b, mistral-7b (D 4096" in text and "| some | bf16 M128 |" in text
    data = json.loads((tmp_path / "k.json").read_text())
    assert data["kernels"][0]["resident_blocks"] == 2
    assert {t["predicted"]["machine"] for t in data["times"]} == {"H100 SXM", "H200 SXM"}
    assert main([*arguments, "--markdown", str(document)]) == 0  # again, into its own output
    assert document.read_text() == text


def test_the_command_fails_on_a_bad_kernel(monkeypatch, capsys):
    bad = replace(REPORT, spill_stores=8)
    monkeypatch.setattr("ttt_kernels.cli.kernels_command.survey", fake_survey((REPORT, bad)))
    assert main(["kernels", "--architectures", "90", "--shapes", "qwen3-0.6b"]) == 1
    assert "spills 8 + 0 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "no markers", f"{kernels_report.END}\n{kernels_report.BEGIN}\n"])
def test_the_command_needs_markers(tmp_path, capsys, text):
    document = tmp_path / "doc.md"
    if text is not None:
        document.write_text(text)
    assert main(["kernels", "--markdown", str(document)]) == 2
    assert "--markdown" in capsys.readouterr().err


def test_the_document_has_the_tables_of_these_kernels():
    """docs/kernels.md names every kernel and every operation of the command."""
    from ttt_kernels.testing.triton_workloads import kernels

    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert text.count(kernels_report.BEGIN) == text.count(kernels_report.END) == 1
    missing = [name for name in kernels() if f"| {name.removesuffix('_kernel')} |" not in text]
    missing += [c.operation for c in cases(["qwen3-4b"]) if f"| {c.operation} |" not in text]
    assert not missing
