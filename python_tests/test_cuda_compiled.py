"""The CUDA C++ kernels as nvcc compiled them: registers, spills, shared memory, instructions. No GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from emulated import cmake_build, tool
from source_tree import ROOT

from ttt_kernels import _extension
from ttt_kernels.cli.documents import markdown_row
from ttt_kernels.testing import cuda_compiled
from ttt_kernels.testing.cuda_compiled import PRODUCTS, STORAGE, CudaReport, complaints, read_kernel
from ttt_kernels.testing.machine_code import Code, find_tool

CSRC = ROOT / "csrc"
ARCHITECTURES = "80-real;90a-real"  # an image of each path
DOCUMENT = ROOT / "docs" / "cuda.md"


def sources() -> list[Path]:
    return [p for folder in ("kernels", "include", "bindings") for p in (CSRC / folder).rglob("*.*")]


def installed() -> Path | None:
    """The installed library, if it holds machine code and nothing in csrc is newer."""
    if not _extension.available():
        return None
    module = _extension.load()
    library = Path(module.__file__)
    newest = max(p.stat().st_mtime for p in sources())
    holds_code = any(name.endswith("-real") for name in module.cuda_architectures)
    return library if holds_code and library.stat().st_mtime >= newest else None


def built() -> Path:
    """One compiled for this, kept in build/."""
    missing = [name for name in ("cmake", "ninja", "nvcc") if tool(name) is None]
    if missing:
        pytest.skip(f"there is no compiled library and no {', '.join(missing)} to make one")
    build = ROOT / "build" / f"compiled-{sys.implementation.cache_tag}"
    return cmake_build(ROOT, build, f"-DTTT_CUDA_ARCHITECTURES={ARCHITECTURES}")


@pytest.fixture(scope="module")
def images() -> dict[str, list[CudaReport]]:
    try:
        for name in ("cuobjdump", "nvdisasm"):
            find_tool(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    library = installed() or built()
    return cuda_compiled.read_library(library, cuda_compiled.storage_bytes(CSRC))


def kernels_in_sources() -> set[str]:
    text = "".join(p.read_text(encoding="utf-8") for p in sources() if p.suffix in (".cu", ".cuh"))
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)) - {cuda_compiled.PROBE}


def test_kernels_are_as_they_should_be(images):
    assert images
    wrong = [text for reports in images.values() for r in reports for text in complaints(r)]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_in_every_image(images):
    everywhere = {name for name in kernels_in_sources() if not name.startswith("sm90_")}
    assert len(everywhere) > 10 and everywhere < kernels_in_sources()
    for image, reports in images.items():
        wanted = kernels_in_sources() if image == "sm_90a" else everywhere
        assert {r.kernel for r in reports} == wanted, image


def test_tables_name_kernels(images):
    known = kernels_in_sources()
    assert set(STORAGE) <= known and set(cuda_compiled.ACCEPTED) <= known
    assert all(a.why for a in cuda_compiled.ACCEPTED.values())


def test_operand_types_compile_alike(images):
    """A version for float16 beside each for bfloat16, with the same matrix instructions."""
    for reports in images.values():
        twins = {r.dtype: [] for r in reports}
        for r in reports:
            twins[r.dtype].append((r.kernel, r.tile, r.wgmma, r.mma_sync, r.threads))
        assert twins["bf16"] == twins["f16"]


def test_two_blocks_share_a_multiprocessor(images):
    """One multiplies while the other stores: what the tiles of the sm_80 path are sized for."""
    for image, reports in images.items():
        mine = [r for r in reports if r.kernel in PRODUCTS and not r.kernel.startswith("sm90_")]
        roomy = mine[0].limits.shared_per_processor > 160_000  # not 8.6, 8.9 and 12.0
        assert all(r.resident_blocks == (2 if roomy else 1) for r in mine), image


def test_the_document_is_current(images):
    """docs/cuda.md has a row for each kernel, and of the same compiler the same numbers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    same = f"nvcc of CUDA {_extension.load().cuda_runtime_version()}." in text if installed() else False
    sections = re.split(r"^### (sm_\w+)$", text, flags=re.M)
    sections = dict(zip(sections[1::2], sections[2::2], strict=True))
    stale = []
    assert set(sections) == {"sm_80", "sm_90a", "sm_100a"}
    for image in set(images) & set(sections):
        for row in cuda_compiled.table(images[image]):
            wanted = markdown_row(row) if same else f"| {row[0]} | {row[1]} |"
            if wanted not in sections[image]:
                stale.append(f"{image}: {wanted}")
    assert not stale, "\n".join(["python docs/cuda_table.py writes what is missing:", *stale])


# --- the tool itself --------------------------------------------------------------------------------
USAGE = {"REG": 64, "STACK": 0, "SHARED": 1024, "THREADS": 128}
PRODUCT = ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32.BF16", "STG.E.128"]
HOPPER = ["UTMALDG.3D", "HGMMA.64x192x16.F32", "HGMMA.64x192x16.F32", "WARPGROUP.DEPBAR.LE", "STG.E.128"]


def report(name: str, opcodes: list[str], usage: dict = USAGE, arguments: str = "__half") -> CudaReport:
    signature = f"void ttt::scan::(anonymous namespace)::{name}<{arguments}>(ttt::scan::Step, long)"
    return read_kernel(signature, "sm_90a", usage, Code(opcodes, []), {"gemm::Stages<bfloat16>": 66560})


def test_signatures_are_read():
    assert report("a_kernel", ["EXIT"]).dtype == "f16"
    state = report("scan_bwd_state_kernel", ["EXIT"], arguments="__nv_bfloat16, (ttt::scan::StateUse)2")
    assert (state.kernel, state.dtype, state.tile) == ("scan_bwd_state_kernel", "bf16", (("use", 2),))
    wide = report("sm90_scan_bwd_state_kernel", ["EXIT"], arguments="__half, 192, (ttt::scan::StateUse)1")
    assert (wide.block_sizes, wide.tile[1]) == ("N192", ("use", 1))
    matvec = report("step_apply_matvec_kernel", ["EXIT"], arguments="__half, 4, 8")
    assert matvec.block_sizes == "D4 T8"
    plain = read_kernel("ttt::a_kernel(ttt::Step)", "sm_80", USAGE, Code(["EXIT"], []), {})
    assert (plain.kernel, plain.dtype, plain.architecture) == ("a_kernel", "", 80)


def test_shared_memory_is_counted():
    """The struct, without what the driver takes for itself."""
    assert report("step_update_kernel", PRODUCT).shared_memory == 66560
    with pytest.raises(RuntimeError, match="a_kernel uses shared memory: STORAGE must name"):
        report("a_kernel", PRODUCT)


def test_the_loop_of_a_product():
    """Not what a branch back from behind the kernel's end, where waiting goes on, lies around it."""
    opcodes = ["SYNCS", "HGMMA", "BRA", "STL", "EXIT", "SYNCS", "BRA"]
    assert Code(opcodes, [(0, 2), (1, 6)]).multiplying_loops() == [["SYNCS", "HGMMA", "BRA"]]
    assert Code(opcodes, [(0, 6)]).multiplying_loops() == [opcodes]
    assert Code(opcodes, [(3, 6)]).multiplying_loops() == []


def test_products_that_are_waited_for():
    wait, product = "WARPGROUP.DEPBAR.LE", "HGMMA.64x192x16.F32"
    assert Code([product, product, "STG", wait, wait, product, wait], []).wgmma_waits == 2
    assert Code([wait, product, product], []).wgmma_waits == 0


def test_threads_are_declared():
    with pytest.raises(RuntimeError, match="a_kernel has no __launch_bounds__"):
        report("a_kernel", ["EXIT"], {"REG": 8, "STACK": 0, "SHARED": 0})


def test_storage_is_asked_of_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    found = cuda_compiled.storage_bytes(CSRC)
    wanted = {struct.format(BLOCK_N=width) for struct in STORAGE.values() for width in (128, 192)}
    assert set(found) == wanted
    assert found["gemm::Stages<bfloat16>"] == 4 * 2 * 128 * 32 * 2 + 1024  # stages, operands, tile, bytes
    assert max(found.values()) <= 232448


@pytest.mark.parametrize(
    ("name", "opcodes", "usage", "words"),
    [
        ("step_update_kernel", PRODUCT[:2], USAGE, "0 mma.sync and 1 cp.async"),
        ("step_update_kernel", PRODUCT[1:], USAGE, "1 mma.sync and 0 cp.async"),
        ("step_update_kernel", [*PRODUCT, "STL", "LDL.64"], USAGE, "spills 4 + 8 bytes"),
        ("step_update_kernel", [*PRODUCT, *["LDG.E"] * 5], USAGE, "only 44% of the loaded bytes"),
        ("step_update_kernel", PRODUCT, {**USAGE, "SHARED": 232448}, "bytes of shared memory, at most"),
        ("sm90_a_kernel", ["STG.E.128"], USAGE, "0 wgmma and 0 loads by TMA"),
        ("sm90_a_kernel", [*HOPPER[:2], *HOPPER[3:4], *HOPPER[2:]], USAGE, "serialised: 2 waits for 2"),
    ],
)
def test_a_bad_kernel_is_refused(name, opcodes, usage, words, monkeypatch):
    monkeypatch.setattr(cuda_compiled, "SHARED_ACCESSES", set())
    good = report(name, PRODUCT if name in PRODUCTS else HOPPER)
    assert not complaints(good)
    assert any(words in text for text in complaints(report(name, opcodes, usage)))


def test_versions_share_a_row():
    one = report("a_kernel", ["LDG.E.128", "STG.E.64"])
    other = replace(one, registers=72, dtype="bf16")
    rows = cuda_compiled.table([one, other, replace(one, kernel="b_kernel")])
    assert [row[0] for row in rows] == ["a", "b"]
    assert rows[0][1:] == ("128", "64-72", "0", "0", "-", "-", "100%", "0%", "7-8")


def test_the_table_is_written(monkeypatch):
    """docs/cuda_table.py, without a library."""
    spec = importlib.util.spec_from_file_location("cuda_table", ROOT / "docs" / "cuda_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake = type("C", (), {"__file__": "x.so", "cuda_runtime_version": staticmethod(lambda: "13.0")})
    reports = {"sm_90a": [report("a_kernel", ["EXIT"])]}
    monkeypatch.setattr(module._extension, "load", lambda: fake)
    monkeypatch.setattr(module.cuda_compiled, "storage_bytes", lambda csrc: {})
    monkeypatch.setattr(module.cuda_compiled, "read_library", lambda library, storage: reports)
    text = module.tables()
    assert text.startswith("Compiled by the nvcc of CUDA 13.0.\n\n### sm_90a\n\n| kernel |")
    assert "| a | 128 | 64 |" in text
