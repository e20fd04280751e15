"""What an operation costs, by formula: FLOPs, bytes and the matrix products it is made of.

FLOPs are those of the public docstrings. Bytes are what no implementation can avoid: every operand read
once and every result written once. What an implementation moves beyond that (its state between chunks,
a weight per chunk) lowers its GB/s. `s` is the size of a value of z.dtype, `a` of the compute precision (4;
8 in float64). Each formula gives one call's (forward, backward); FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from ttt_kernels.cli.bench_case import DTYPES, PREFILL, Case
from ttt_kernels.types import compute_dtype

CONV_TAPS = 5
Pair = tuple[int, int]
Products = tuple[tuple[int, int, int], ...]


def sizes(case: Case) -> tuple[int, int]:
    """(s, a)."""
    dtype = DTYPES[case.dtype]
    return dtype.itemsize, compute_dtype(dtype).itemsize


def rows(case: Case) -> int:
    return case.batch * case.tokens


def written(case: Case) -> int:
    """Tokens of the one chunk of each row that `fast_weight_update_` writes."""
    return min(case.chunk_size, case.tokens)


# --- scan -----------------------------------------------------------------------------------------
def scan_flops(case: Case) -> Pair:
    """Per token 4 D F forward (apply and write), 10 D F backward (five products)."""
    return 4 * case.d * case.f * rows(case), 10 * case.d * case.f * rows(case)


def scan_bytes(case: Case) -> Pair:
    """Forward reads z, v, w0 and writes y: s (B T (F + 2 D) + D F), prefill the state too: a B D F.
    Backward reads z, v, w0, dy and writes dz, dv, dw0: s (B T (2 F + 3 D) + 2 D F)."""
    s, a = sizes(case)
    d, f, weight = case.d, case.f, case.d * case.f
    state = a * case.batch * weight if case.mode == PREFILL else 0
    forward = s * (rows(case) * (f + 2 * d) + weight) + state
    return forward, s * (rows(case) * (2 * f + 3 * d) + 2 * weight)


def scan_gemms(case: Case) -> Products:
    """Apply of all tokens with one weight, write of one chunk."""
    return (case.tokens, case.f, case.d), (case.d, written(case), case.f)


# --- the plain down-projection, the floor ---------------------------------------------------------
def plain_flops(case: Case) -> Pair:
    """Per token 2 D F forward, 4 D F backward."""
    return 2 * case.d * case.f * rows(case), 4 * case.d * case.f * rows(case)


def plain_bytes(case: Case) -> Pair:
    """Forward reads z, w0 and writes y: s (B T (F + D) + D F). Backward reads z, w0, dy and writes dz,
    dw0: s (B T (2 F + D) + 2 D F)."""
    s, _ = sizes(case)
    d, f, weight = case.d, case.f, case.d * case.f
    return s * (rows(case) * (f + d) + weight), s * (rows(case) * (2 * f + d) + 2 * weight)


def plain_gemms(case: Case) -> Products:
    return ((case.tokens, case.f, case.d),)


# --- decode ---------------------------------------------------------------------------------------
def apply_flops(case: Case) -> Pair:
    """Per token 2 D F forward, 4 D F backward."""
    return plain_flops(case)


def apply_bytes(case: Case) -> Pair:
    """Forward reads every row's own weight and z, writes y: a B D F + s B T (F + D). Backward reads
    weights, z, dy and writes their gradients: 2 a B D F + s B T (2 F + D)."""
    s, a = sizes(case)
    d, f, weights = case.d, case.f, a * case.batch * case.d * case.f
    return weights + s * rows(case) * (f + d), 2 * weights + s * rows(case) * (2 * f + d)


def update_flops(case: Case) -> Pair:
    """Per token of the chunk 2 D F; no gradient."""
    return 2 * case.d * case.f * case.batch * written(case), 0


def update_bytes(case: Case) -> Pair:
    """Reads and writes every row's weight, reads one chunk of z and v: 2 a B D F + s B C (F + D)."""
    s, a = sizes(case)
    d, f, b = case.d, case.f, case.batch
    return 2 * a * b * d * f + s * b * written(case) * (f + d), 0


def update_gemms(case: Case) -> Products:
    return ((case.d, written(case), case.f),)


# --- closed-form write ----------------------------------------------------------------------------
def ridge_flops(case: Case) -> Pair:
    """With N = T - 1 pairs and n = min(N, F), per prompt 2 N D^2 + 4 N D F + n N F + n^3 / 3 + 2 n^2 D: what
    is computed here, with half a Gram matrix and D right-hand sides. No gradient."""
    pairs, d, f = case.tokens - 1, case.d, case.f
    n = min(pairs, f)
    common = 2 * pairs * d * (d + 2 * f)
    return case.batch * (common + n * pairs * f + n**3 // 3 + 2 * n * n * d), 0


def ridge_known_flops(case: Case) -> Pair:
    """With z w0^T given: 2 N D F less."""
    return ridge_flops(case)[0] - 2 * case.batch * (case.tokens - 1) * case.d * case.f, 0


def ridge_bytes(case: Case) -> Pair:
    """Reads z, x, w0, P and writes the update: s (B T (F + D) + D F + D^2) + a B D F."""
    s, a = sizes(case)
    d, f = case.d, case.f
    return s * (rows(case) * (f + d) + d * f + d * d) + a * case.batch * d * f, 0


def ridge_known_bytes(case: Case) -> Pair:
    """Reads y too: a B T D more."""
    return ridge_bytes(case)[0] + sizes(case)[1] * rows(case) * case.d, 0


# --- targets --------------------------------------------------------------------------------------
def next_token_flops(case: Case) -> Pair:
    """Per token 2 D^2 forward, 4 D^2 backward."""
    return 2 * case.d**2 * rows(case), 4 * case.d**2 * rows(case)


def next_token_bytes(case: Case) -> Pair:
    """Forward reads x, P and writes v: s (2 B T D + D^2). Backward reads x, P, dv and writes dx, dP:
    s (3 B T D + 2 D^2)."""
    s, _ = sizes(case)
    d = case.d
    return s * (2 * rows(case) * d + d * d), s * (3 * rows(case) * d + 2 * d * d)


def conv_flops(case: Case) -> Pair:
    """Per token 2 D^2 + 2 KW D forward, twice that backward."""
    forward = (2 * case.d**2 + 2 * CONV_TAPS * case.d) * rows(case)
    return forward, 2 * forward


def conv_bytes(case: Case) -> Pair:
    """As `next_token_bytes`, and the taps: s KW D forward, 2 s KW D backward."""
    s, _ = sizes(case)
    forward, backward = next_token_bytes(case)
    taps = s * CONV_TAPS * case.d
    return forward + taps, backward + 2 * taps


def projection_gemms(case: Case) -> Products:
    return ((rows(case), case.d, case.d),)


# --- step sizes -----------------------------------------------------------------------------------
def gram_flops(case: Case) -> Pair:
    """Per token 2 C (D + F) forward, three times that backward."""
    forward = 2 * case.chunk_size * (case.d + case.f) * rows(case)
    return forward, 3 * forward


def gram_bytes(case: Case) -> Pair:
    """Forward reads z, v and writes a number per chunk: s B T (F + D) + a B NC. Backward reads these
    numbers' gradients, z, v and writes dz, dv: 2 s B T (F + D) + a B NC."""
    s, a = sizes(case)
    operands, numbers = s * rows(case) * (case.f + case.d), a * case.batch * case.chunks
    return operands + numbers, 2 * operands + numbers


def gram_gemms(case: Case) -> Products:
    c = case.chunk_size
    return (c, case.f, c), (c, case.d, c)
