"""The emulation finds what is missing: kernels pass under every schedule, and with one line changed they do
not. The scan's own kernels are the ones changed, and the example products of csrc/tests where those of the
scan would not show it."""

from __future__ import annotations

import pytest
from emulated_programs import COMPILER, Change, Programs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is built with g++, and there is none")

SM80, SM90 = "tests/gemm_sm80.cu", "tests/gemm_sm90.cu"
ARRIVAL = "if (threadIdx.x == 128) barrier_arrive(&shared.empty[stage]);"
DESCRIPTOR, RELEASE = "box_descriptor<kA>(shared.a[stage], ", "release_registers<40>();"
GEMM = {  # the line, what stands there instead, and what the failure says
    "barrier": (SM80, "__syncthreads();", "", "wrong result"),
    "shallow wait_copies": (SM80, "wait_copies<kStages - 2>", "wait_copies<kStages - 1>", "wrong result"),
    "parity": (SM90, "% 2 ^ 1);", "% 2);", "nothing can go on"),
    "barrier after init": (SM90, "__syncthreads();", "", "nobody has initialised"),
    "fence of the inits": (SM90, "fence_barrier_init();", "", "without fence_barrier_init"),
    "expected bytes": (SM90, "(1 + kN / kBox) * kBoxBytes", "kN / kBox * kBoxBytes", ""),
    "arrival": (SM90, ARRIVAL, "", "lacks 1 arrivals"),
    "fence_accumulators": (SM90, "fence_accumulators();", "", "wgmma without fence_accumulators"),
    "commit_products": (SM90, "commit_products();", "", "ended before wait_products"),
    "wait_products": (SM90, "wait_products<0>();", "", "ended before wait_products"),
    "barrier before a store": (SM90, "named_barrier(1, 128);", "", ""),
    "step of a descriptor": (SM90, DESCRIPTOR + "k)", DESCRIPTOR + "0)", "wrong result"),
    "registers of one warp": (SM90, RELEASE, "if (threadIdx.x < 32) " + RELEASE, "not all warps"),
}

CLUSTER = "tests/gemm_cluster.cu"
EMPTY = "barrier_init(&shared.empty[stage], kCluster);"
ARRIVALS = "if (thread < kCluster) barrier_arrive_cluster(&shared.empty[stage], thread);"
OWN_ARRIVAL = "if (thread == 0) barrier_arrive(&shared.empty[stage]);"
GEMM_OF_CLUSTER = {  # lines, what stands there instead, and what the failure says
    "cluster_sync first": ({"cluster_sync();\n  if": "__syncthreads();\n  if"}, "nobody has initialised"),
    "fence of the inits": ({"fence_barrier_init();": "(void)0;"}, "without fence_barrier_init"),
    "cluster_sync last": ({"cluster_sync();\n}": "}"}, "of the cluster has ended"),
    "arrival at the other block": ({ARRIVALS: OWN_ARRIVAL}, "lacks 1 arrivals"),
    "arrival, not counted": ({ARRIVALS: OWN_ARRIVAL, EMPTY: EMPTY.replace("kCluster", "1")}, ""),
    "bytes of the other block": ({"(1 + kCluster) * kBoxBytes": "2 * kBoxBytes"}, ""),
    "mask of one": ({"full, kAll);": "full, 1 << rank);"}, "and 8192 bytes"),
    "mask of three": ({"full, kAll);": "full, 7);"}, "block 2 of the cluster, which has 2"),
    "both halves": ({"shared.b[stage][rank]": "shared.b[stage][0]"}, "over a load that is under way"),
}

# The file that is changed, and the one that is compiled anew.
APPLY_80, APPLY_90 = "kernels/scan/forward_step.cu", "kernels/scan/sm90_forward_step.cu"
STATE_90 = "kernels/scan/sm90_state_step.cu"
SLAB = ("include/ttt/gemm_sm80.cuh", APPLY_80)
PIPELINE, TILES = ("kernels/scan/sm90_pipeline.cuh", APPLY_90), ("kernels/scan/sm90_tiles.cuh", APPLY_90)
SLAB_WAIT = "wait_copies<kStages - 2>();\n"
FREE = "barrier_wait(&storage.empty[at.stage], at.phase ^ 1);"
LOADED = "barrier_wait(&storage.full[at.stage], at.phase"
TURN = "barrier_wait(&storage.turns[group], turn_phase);"
FREED = "if (lane() < kCluster) barrier_arrive_cluster"
SCAN = {
    "wait_copies": (SLAB, SLAB_WAIT, "", ""),
    "barrier": (SLAB, SLAB_WAIT + "    __syncthreads();", SLAB_WAIT, ""),
    "barrier before the scale is read": ((APPLY_80, APPLY_80), "__syncthreads();", "", "wrong result"),
    "wait for a free stage": (PIPELINE, FREE, "", ""),
    "parity": (PIPELINE, LOADED + ");", LOADED + " ^ 1);", ""),
    "wait_products of the step before": (PIPELINE, "wait_products<1>();", "", "wrong result"),
    "fence of cleared rows": (PIPELINE, "fence_async_shared();", "", "without fence_async_shared"),
    "turn": (PIPELINE, TURN, "", ""),
    "place of the next turn": (PIPELINE, "if (thread == 0) storage.cursors[group ^ 1] = at;", "", ""),
    "warp that passes the turn": ((PIPELINE[0], STATE_90), "__syncwarp();", "", "nothing can go on"),
    "turn is passed": (PIPELINE, "pass_turn();\n    finish(c);", "finish(c);", "nothing can go on"),
    "arrival at the neighbour": (PIPELINE, FREED, FREED.replace("kCluster)", "1)"), "nothing can go on"),
    "boxes of the neighbour": (PIPELINE, "(rank + step) % kCluster", "step % kCluster", ""),
    "the neighbours' start": (PIPELINE, "}\n  cluster_sync();\n", "}\n  __syncthreads();\n", ""),
    "the neighbours' end": (PIPELINE, "  cluster_sync();  //", "  //", ""),
    "wait_stores_read": (TILES, "wait_stores_read<1>();", "", ""),
    "fence before a store": (TILES, "fence_async_shared();", "", "without fence_async_shared"),
}

# Under AddressSanitizer: reads and writes beyond the tensors.
BOUNDS = {
    "rows read": ("first + row < rows && ", ""),
    "rows written": ("if (row < m && column < n)", "if (column < n)"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.getbasetemp() / "emulated_programs")


def expected(programs: Programs, name: str):
    """The outputs of the program as it is."""
    file = programs.folder / f"{name}.expected"
    if not file.exists():
        written = programs.run(programs.build(name), "write", file)
        assert written.returncode == 0, written.stdout
    return file


def fails(programs: Programs, name: str, unit: str, changes: list[Change], shows: str) -> None:
    mutant = programs.mutant(name, [unit], changes)
    checked = programs.run(mutant, "check", expected(programs, name))
    assert checked.returncode == 1, f"passed under every schedule\n{checked.stderr}"
    assert shows in checked.stdout, checked.stdout


@pytest.mark.parametrize("name", ["gemm", "scan"])
def test_same_bits_under_every_schedule(programs, name):
    checked = programs.run(programs.build(name), "check", expected(programs, name))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("what", GEMM)
def test_mutant_of_a_product_fails(programs, what):
    file, old, new, shows = GEMM[what]
    fails(programs, "gemm", file, [Change(file, old, new or "(void)0;")], shows)


@pytest.mark.parametrize("what", GEMM_OF_CLUSTER)
def test_mutant_of_the_product_of_a_cluster_fails(programs, what):
    lines, shows = GEMM_OF_CLUSTER[what]
    fails(programs, "gemm", CLUSTER, [Change(CLUSTER, old, new) for old, new in lines.items()], shows)


@pytest.mark.parametrize("what", SCAN)
def test_mutant_of_the_scan_fails(programs, what):
    (file, unit), old, new, shows = SCAN[what]
    fails(programs, "scan", unit, [Change(file, old, new or "(void)0;")], shows)


def test_sanitized(programs):
    checked = programs.run(programs.build("gemm", sanitized=True), "check", expected(programs, "gemm"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("what", BOUNDS)
def test_missing_bounds_check_is_seen_by_the_sanitizer(programs, what):
    mutant = programs.mutant("gemm", [SM80], [Change(SM80, *BOUNDS[what])], sanitized=True)
    checked = programs.run(mutant, "check", expected(programs, "gemm"))
    assert checked.returncode != 0
    assert "AddressSanitizer" in checked.stderr and "gemm_kernel" in checked.stderr, checked.stdout
