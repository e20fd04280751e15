"""The emulation of csrc/emulation against what the hardware documents: every fragment layout, the swizzle,
boxes that leave the tensor, the four layouts of wgmma, conversions bit by bit; and what it refuses."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from emulated_programs import COMPILER, SOURCES, Change, Programs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is built with g++, and there is none")
LANES = np.arange(32)
G, Q = LANES // 4, LANES % 4
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    return Programs(tmp_path_factory.getbasetemp() / "emulated_programs")


@pytest.fixture(scope="module")
def library(programs) -> ctypes.CDLL:
    names = ("primitives.cu", "clusters.cu", "gemm_sm80.cu", "gemm_sm90.cu", "gemm_cluster.cu")
    loaded = ctypes.CDLL(str(programs.library("kernels.so", [SOURCES / "tests" / name for name in names])))
    loaded.ttt_emulation_last_error.restype = ctypes.c_char_p
    loaded.ttt_emulation_set_schedule.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    return loaded


def pointer(x: np.ndarray | torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data)


def passed(library: ctypes.CDLL, code: int) -> None:
    assert code == 0, library.ttt_emulation_last_error().decode()


def aligned(count: int, dtype: type) -> np.ndarray:
    """Memory at a multiple of 64 bytes, as that of a device is."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)


# --- a warp ---------------------------------------------------------------------------------------
def pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first.astype(np.uint32) | second.astype(np.uint32) << 16


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(library, transposed):
    matrices = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8), dtype=np.uint16)
    r = np.zeros((32, 4), np.uint32)
    passed(library, library.matrices_of(pointer(matrices), ctypes.c_bool(transposed), pointer(r)))
    for i, m in enumerate(matrices.transpose(0, 2, 1) if transposed else matrices):
        np.testing.assert_array_equal(r[:, i], pair(m[G, 2 * Q], m[G, 2 * Q + 1]))


@pytest.mark.parametrize("name", TYPES)
def test_mma(library, name):
    a, b = torch.randn(16, 16).to(TYPES[name]), torch.randn(16, 8).to(TYPES[name])
    c = torch.randn(16, 8)
    bits_a, bits_b = a.view(torch.int16).numpy().view(np.uint16), b.view(torch.int16).numpy().view(np.uint16)
    corners = [(0, 0), (8, 0), (0, 8), (8, 8)]
    of_a = [pair(bits_a[G + i, 2 * Q + j], bits_a[G + i, 2 * Q + 1 + j]) for i, j in corners]
    of_b = [pair(bits_b[2 * Q + i, G], bits_b[2 * Q + 1 + i, G]) for i in (0, 8)]
    places = [(G + 8 * (i // 2), 2 * Q + i % 2) for i in range(4)]
    of_c = np.stack([c.numpy()[place] for place in places], 1).copy()
    in_a, in_b = np.stack(of_a, 1).copy(), np.stack(of_b, 1).copy()
    passed(
        library,
        library.product_of(ctypes.c_bool(name == "bfloat16"), pointer(in_a), pointer(in_b), pointer(of_c)),
    )
    expected = (c.double() + a.double() @ b.double()).numpy()
    for i, place in enumerate(places):
        np.testing.assert_allclose(of_c[:, i], expected[place], rtol=1e-5, atol=1e-5)


def test_shuffles_and_votes(library):
    x = np.random.default_rng(1).integers(0, 1000, 32).astype(np.int32)
    r = np.zeros((32, 8), np.int32)
    passed(library, library.lanes_of(pointer(x), pointer(r)))
    np.testing.assert_array_equal(r[:, 0], x[LANES ^ 5])
    np.testing.assert_array_equal(r[:, 1], x[np.where(LANES + 3 < 32, LANES + 3, LANES)])
    np.testing.assert_array_equal(r[:, 2], x[np.where(LANES % 8 >= 3, LANES - 3, LANES)])
    np.testing.assert_array_equal(r[:, 3], x[LANES // 16 * 16 + 9])
    np.testing.assert_array_equal(r[:, 4].copy().view(np.uint32), np.sum(x % 2 * (1 << LANES)))
    np.testing.assert_array_equal(r[:, 5], 1)
    np.testing.assert_array_equal(r[:, 6], x[np.where(LANES < 16, LANES ^ 1, LANES ^ 2)])
    np.testing.assert_array_equal(r[:, 7], x.sum())


# --- boxes ----------------------------------------------------------------------------------------
def swizzled(box: np.ndarray) -> np.ndarray:
    """[64 rows, 64 columns] as it lies in shared memory: piece p of row r at p ^ (r % 8)."""
    rows, pieces = np.arange(64)[:, None], np.arange(8)[None, :]
    into = np.empty((64, 8, 8), box.dtype)
    into[rows, pieces ^ rows % 8] = box.reshape(64, 8, 8)
    return into


INDICES = [(0, 0, 0), (1, 3, 5), (0, -7, -13), (1, 60, 72), (2, 0, 0), (-1, 0, 0), (0, 100, 0), (0, 0, -70)]


@pytest.mark.parametrize("index", INDICES)
def test_boxes(library, index):
    sizes, strides = np.array([2, 90, 104], np.int64), np.array([90 * 112 + 8, 112], np.int64)
    memory = aligned(2 * int(strides[0]), np.uint16)
    memory[:] = np.arange(memory.size) + 1
    tensor = np.lib.stride_tricks.as_strided(memory, (2, 90, 104), (2 * strides[0], 2 * strides[1], 2))
    around = np.zeros((5, 90 + 256, 104 + 256), np.uint16)  # plane -1 is the last, a zero one
    around[:2, 128 : 128 + 90, 128 : 128 + 104] = tensor
    plane, row, column = index
    window = around[plane, row + 128 : row + 192, column + 128 : column + 192]

    box = np.zeros((64, 8, 8), np.uint16)
    where = [pointer(memory), pointer(sizes), pointer(strides), pointer(np.array(index, np.int32))]
    passed(library, library.box_of(False, *where, pointer(box)))
    np.testing.assert_array_equal(box, swizzled(window))

    written = np.random.default_rng(2).integers(0, 1 << 16, (64, 64), dtype=np.uint16)
    before = memory.copy()
    window[:] = written
    laid = swizzled(written)
    passed(library, library.box_of(True, *where, pointer(laid)))
    np.testing.assert_array_equal(tensor, around[:2, 128 : 128 + 90, 128 : 128 + 104])
    tensor[:] = 0
    expected = np.lib.stride_tricks.as_strided(before, tensor.shape, tensor.strides)
    expected[:] = 0
    np.testing.assert_array_equal(memory, before)  # nothing between the rows was touched


def test_tensor_map_is_refused(library):
    memory, index, box = aligned(64 * 64, np.uint16), np.zeros(3, np.int32), np.zeros(4096, np.uint16)
    for offset, sizes, strides in [
        (1, (1, 8, 64), (4096, 64)),  # base
        (0, (1, 8, 64), (4096, 60)),  # stride
        (0, (1, 0, 64), (4096, 64)),  # size
    ]:
        arguments = [np.array(sizes, np.int64), np.array(strides, np.int64), index, box]
        code = library.box_of(False, pointer(memory[offset:]), *map(pointer, arguments))
        assert code == 1  # cudaErrorInvalidValue, as of the driver


# --- products -------------------------------------------------------------------------------------
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("columns", [128, 192])
@pytest.mark.parametrize("name", TYPES)
def test_wgmma(library, name, columns, transposed):
    m, n, k = 72, 264, 88
    a, b = torch.randn(m, k).to(TYPES[name]), torch.randn(n, k).to(TYPES[name])
    laid = [x.T.contiguous() if t else x for x, t in zip((a, b), transposed, strict=True)]
    c = torch.full((m, n), torch.nan, dtype=TYPES[name])
    passed(
        library,
        library.gemm_sm90(
            ctypes.c_bool(name == "bfloat16"), columns, *map(ctypes.c_bool, transposed), *map(pointer, laid),
            pointer(c), *map(ctypes.c_int64, (m, n, k)),
        ),
    )  # fmt: skip
    exact = a.double() @ b.double().T
    torch.testing.assert_close(c.double(), exact, rtol=torch.finfo(c.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_mma_sync_product(library, name):
    m, n, k = 72, 136, 88
    a, b = torch.randn(m, k).to(TYPES[name]), torch.randn(n, k).to(TYPES[name])
    c = torch.full((m, n), torch.nan)
    passed(
        library,
        library.gemm_sm80(
            ctypes.c_bool(name == "bfloat16"), *map(pointer, (a, b, c)), *map(ctypes.c_int64, (m, n, k))
        ),
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)


SCHEDULES = [(order, timing) for order in range(3) for timing in range(3)]


@pytest.fixture
def scheduled(library, request):
    """The library under a schedule (order, timing)."""
    library.ttt_emulation_set_schedule(*request.param, 6)
    yield library
    library.ttt_emulation_set_schedule(0, 1, 0)


@pytest.mark.parametrize("scheduled", SCHEDULES, indirect=True)
@pytest.mark.parametrize("name", TYPES)
def test_product_of_a_cluster(scheduled, name):
    m, n, k = 136, 136, 264
    a, b = torch.randn(m, k).to(TYPES[name]), torch.randn(n, k).to(TYPES[name])
    c = torch.full((m, n), torch.nan)
    code = scheduled.gemm_cluster(
        ctypes.c_bool(name == "bfloat16"), *map(pointer, (a, b, c)), *map(ctypes.c_int64, (m, n, k))
    )
    passed(scheduled, code)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_conversions(library, name):
    """Every 16-bit pattern to float32; and back the neighbourhood of each, ties and NaN included."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(patterns.view(np.int16)).view(TYPES[name])
    exact = values.float().numpy()
    with np.errstate(all="ignore"):
        next_one = np.roll(exact, -1)
        ties = ((exact.astype(np.float64) + next_one) / 2).astype(np.float32)
        inputs = np.stack([exact, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, exact * 2)])
    for x in inputs:
        x = np.ascontiguousarray(x)
        rounded, back = np.zeros(1 << 16, np.uint16), np.zeros(1 << 16, np.float32)
        of = [pointer(array) for array in (x, rounded, back)]
        passed(library, library.convert_of(ctypes.c_bool(name == "bfloat16"), *of))
        np.testing.assert_array_equal(back, exact)  # NaN equals NaN here
        expected = torch.from_numpy(x).to(TYPES[name])
        ours = torch.from_numpy(rounded.view(np.int16)).view(TYPES[name])
        nan = expected.isnan()
        assert torch.equal(ours.isnan(), nan)
        assert torch.equal(ours[~nan].view(torch.int16), expected[~nan].view(torch.int16))


# --- clusters -------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduled", [(0, 1), (1, 0), (2, 2)], indirect=True)
@pytest.mark.parametrize(("cluster", "origin", "mask"), [(1, 0, 1), (2, 1, 1), (4, 2, 0b1011), (8, 7, 0xFF)])
def test_multicast(scheduled, cluster, origin, mask):
    """The box arrives in the blocks of the mask, whichever block loads it, and in no other."""
    rows, columns = 2, 2 * cluster
    memory = aligned(64 * 64, np.uint16)
    memory[:] = np.random.default_rng(3).integers(0, 1 << 15, memory.size)
    ranks = np.full((rows, columns), -1, np.int32)
    boxes = np.zeros((rows, columns, 64, 8, 8), np.uint16)
    arrays = [pointer(memory), origin, mask, pointer(ranks), pointer(boxes)]
    passed(scheduled, scheduled.multicast_of(cluster, rows, columns, *arrays))
    np.testing.assert_array_equal(ranks, np.arange(columns)[None] % cluster + np.zeros((rows, 1), int))
    for box, rank in zip(boxes.reshape(-1, 64, 8, 8), ranks.ravel(), strict=True):
        poison = np.full_like(box, 0xFFFF)
        np.testing.assert_array_equal(box, swizzled(memory.reshape(64, 64)) if mask >> rank & 1 else poison)


def test_cluster_limits(library):
    memory, out = aligned(64 * 64, np.uint16), np.zeros(1 << 16, np.uint8)
    arrays = [pointer(memory), 0, 1, pointer(out), pointer(out)]
    assert library.multicast_of(0, 1, 2, *arrays) == 912  # cudaErrorInvalidClusterSize
    assert library.multicast_of(9, 1, 9, *arrays) == 912
    assert library.multicast_of(2, 1, 3, *arrays) == 9  # cudaErrorInvalidConfiguration


CLUSTER_FAULTS = [  # in the order of csrc/tests/clusters.cu, from 2: order of blocks, what the error says
    (2, 0, "barrier_arrive_cluster: block 1 of the cluster has ended"),
    (3, 0, "an mbarrier that nobody has initialised"),
    (3, 1, "an mbarrier that nobody has initialised"),
    (4, 0, "has not told of its mbarrier by fence_barrier_init and cluster_sync"),
    (5, 0, "barrier_arrive_cluster: block 2 of the cluster, which has 2"),
    (6, 0, "load_box_multicast: block 1 of the cluster has ended"),
    (6, 1, "block (1, 0, 0), thread 0: the block ended before a load into it had arrived"),
    (7, 0, "an mbarrier that nobody has initialised"),
    (8, 0, "load_box_multicast: block 2 of the cluster, which has 2"),
    (9, 0, "load_box_multicast into no block"),
    (10, 0, "load_box over ordinary stores without fence_async_shared"),
    (11, 0, "load_box over a load that is under way"),
    (12, 0, "nothing can go on: in block (0, 0, 0) threads 0 to 31 wait in barrier_wait of parity 0 at "),
    (12, 0, "; in block (1, 0, 0) threads 0 to 31 wait in cluster_sync, where 32 of 64 threads are"),
]


@pytest.mark.parametrize(("fault", "order", "text"), CLUSTER_FAULTS)
def test_faults_of_clusters_are_told(library, fault, order, text):
    memory = aligned(64 * 64, np.uint16)
    library.ttt_emulation_set_schedule(order, 1, 0)
    code = library.cluster_fault_of(fault, pointer(memory))
    library.ttt_emulation_set_schedule(0, 1, 0)
    error = library.ttt_emulation_last_error().decode()
    assert code == 719 and text in error, error
    for none in (0, 1):  # the next launch is well; a thread that has ended is not waited for
        passed(library, library.cluster_fault_of(none, pointer(memory)))


# --- what is refused ------------------------------------------------------------------------------
FAULTS = [  # in the order of csrc/tests/primitives.cu, from 1: threads, what the error says
    (128, "threads 0 to 63 have ended; threads 64 to 127 wait in __syncthreads, where 64 of 128 threads are"),
    (128, "cp.async at shared address 1032, which is no multiple of 16"),
    (128, "cp.async outside shared memory"),
    (128, "the lanes of a warp have to call ldmatrix together"),
    (128, "a shuffle reads a lane that takes no part in it"),
    (128, "a multiple of 32 threads, got id 1 and 33 threads"),
    (128, "named_barrier 1 of 96 threads, where others wait for 64"),
    (128, "an mbarrier that nobody has initialised"),
    (128, "whose phase 0 lacks 1 arrivals and 0 bytes"),
    (128, "a box at shared address 1536, which is no multiple of 1024"),
    (128, "a wgmma operand outside shared memory"),
    (384, "acquire_registers, where 256 each are wanted"),
    (128, "accumulators were written after fence_accumulators"),
    (128, "accumulators were written before wait_products"),
    (128, "the kernel uses 32768 bytes of shared memory"),
    (128, "setmaxnreg, where 1 of 32 lanes are"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "threads", "text"), [(i, *row) for i, row in enumerate(FAULTS, 1)])
def test_faults_are_told(library, fault, threads, text):
    memory = aligned(64 * 64, np.uint16)
    assert library.fault_of(fault, threads, pointer(memory)) == 719  # cudaErrorLaunchFailure
    error = library.ttt_emulation_last_error().decode()
    assert text in error and "block (0, 0, 0), thread " in error
    passed(library, library.fault_of(0, threads, pointer(memory)))  # and the next launch is well


def test_launch_limits(library):
    memory = aligned(64 * 64, np.uint16)
    assert library.fault_of(0, 1056, pointer(memory)) == 9  # cudaErrorInvalidConfiguration


# --- the twins ------------------------------------------------------------------------------------
def test_twins_have_the_same_functions():
    """Name and number of parameters of every function, but for the TTT_SITE of the emulation's."""
    parameter_list = r"(?:[^()]|\(&\w*\)|\(\*\w+\)\([^()]*\))*"
    definition = re.compile(rf"\b(\w+)(?:<\w+>)?\(({parameter_list})\)\s*\{{")

    def functions(path) -> set[tuple[str, int]]:
        text = re.sub(r"//[^\n]*|,?\s*TTT_SITE|/\*.*?\*/", "", path.read_text())
        found = [match for match in definition.findall(text) if match[0] not in ("if", "for", "while")]
        return {(name, parameters.count(",") + bool(parameters.strip())) for name, parameters in found}

    for name in ("platform", "async_copy", "mma", "hopper"):
        device = functions(SOURCES / f"include/ttt/primitives/{name}.cuh")
        emulated = functions(SOURCES / f"emulation/ttt/primitives/{name}.cuh")
        assert len(device) > 2 and device <= emulated, (name, device - emulated)


def test_twins_make_the_same_descriptor():
    """It is plain arithmetic, so that the emulation reads what the hardware will be given."""
    pattern = re.compile(r"std::uint64_t box_descriptor\(.*?\n\}", re.DOTALL)
    texts = [
        pattern.search((SOURCES / folder / "ttt/primitives/hopper.cuh").read_text())[0]
        for folder in ("include", "emulation")
    ]
    assert texts[0] == texts[1]


def test_portable_stacks(programs):
    """ucontext, which machines other than x86-64 use, does the same."""
    change = Change("emulation/fiber.h", "#ifndef __x86_64__", "#if 1")
    expected = programs.folder / "expected"
    written = programs.run(programs.build("gemm"), "write", expected)
    assert written.returncode == 0, written.stdout
    portable = programs.mutant("gemm", ["emulation/fiber.cpp", "emulation/cluster.cpp"], [change])
    checked = programs.run(portable, "check", expected)
    assert checked.returncode == 0, checked.stdout
