"""`FastWeightState`: copies, batch operations, going back, and files."""

import json

import pytest
import torch
from helpers import error, randn
from test_streaming import RULES, C, D, layer, streamed
from torch import Tensor, nn

import ttt_kernels as ttt
from ttt_kernels.modules import BatchFacts

BOUND = 1e-13


class Two(nn.Module):
    """Two fast-weight layers in a row: as much of a model as a state needs."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(**options) for _ in range(2))

    def forward(self, x: Tensor, state: ttt.FastWeightState | None = None) -> Tensor:
        for i, mlp in enumerate(self.layers):
            facts = None if state is None else BatchFacts(state=state.layers[i])
            x = x + mlp(x, facts)
        return x


def fresh(model: nn.Module, x: Tensor | None = None) -> ttt.FastWeightState:
    """An empty state, or one that has read x."""
    state = ttt.FastWeightState.for_model(model)
    if x is not None:
        model(x, state)
    return state


def close(got: Tensor, want: Tensor) -> None:
    assert error(got, want) <= BOUND


@pytest.fixture(params=[False, True], ids=["free", "preserved"])
def model(request) -> Two:
    return Two(preserve_row_norm=request.param)


@pytest.fixture
def x() -> Tensor:
    return 0.5 * randn(3, 5 * C + 3, D)


CUTS = [3, C - 1, C, C + 3, 2 * C + 5]


@pytest.mark.parametrize("cut", CUTS)
def test_reorder_repeat_and_select(model, x, cut):
    """Beams: rows that share go their own ways as soon as they are written."""
    state = fresh(model, x[:, :cut])
    picks = [2, 0, 0, 1, 2]
    state.reorder(picks)
    assert len(state) == 5
    tails = randn(5, 2 * C + 1, D, seed=7)
    got = torch.cat([model(tails[:, n : n + 1], state) for n in range(2 * C + 1)], 1)
    close(got, model(torch.cat([x[picks][:, :cut], tails], 1))[:, cut:])
    state.select([4, 1])
    more = randn(2, C, D, seed=8)
    whole = torch.cat([x[[2, 0]][:, :cut], tails[[4, 1]], more], 1)
    close(model(more, state), model(whole)[:, -C:])
    state.repeat(2)
    assert state.positions == [cut + 3 * C + 1] * 4
    close(model(more[[0, 0, 1, 1]], state)[1:3], model(torch.cat([whole, more], 1))[:, -C:])


@pytest.mark.parametrize("cut", CUTS)
def test_clone_snapshot_and_restore(model, x, cut):
    state = fresh(model, x[:, :cut])
    twin, snapshot = state.clone(), state.snapshot()
    want = model(x)[:, cut:]
    for other in (state, twin):
        close(torch.cat([model(t, other) for t in x[:, cut:].split(1, 1)], 1), want)
    for _ in range(2):
        state.restore(snapshot)
        assert state.positions == [cut] * 3
        close(model(x[:, cut:], state), want)


def test_copies_share_until_written(model, x):
    state = fresh(model, x[:, : C + 1])
    alone = state.nbytes
    state.repeat(3)
    assert state.nbytes == alone
    twin = state.clone()
    address = state.layers[0].rows[0].weight[0].data_ptr()
    assert twin.layers[0].rows[0].weight[0].data_ptr() == address
    model(x.repeat_interleave(3, 0)[:, C + 1 : C + 2], state)
    assert state.layers[0].rows[0].weight[0].data_ptr() == address, "one token copies no weight"
    model(x.repeat_interleave(3, 0)[:, C + 2 : 2 * C], state)
    assert state.layers[0].rows[0].weight[0].data_ptr() != address
    assert twin.layers[0].rows[0].weight[0].data_ptr() == address


def test_concat(model, x):
    parts = [fresh(model, x[b : b + 1, : n + C]) for b, n in enumerate((3, 7, C))]
    both = ttt.FastWeightState.concat(parts)
    assert both.positions == [C + 3, C + 7, 2 * C] and len(both) == 3
    tail = randn(3, C + 2, D, seed=5)
    got = model(tail, both)
    for b, n in enumerate((3, 7, C)):
        whole = torch.cat([x[b : b + 1, : n + C], tail[b : b + 1]], 1)
        close(got[b : b + 1], model(whole)[:, n + C :])
    assert parts[0].positions == [C + 3]
    with pytest.raises(ValueError, match="at least one FastWeightState"):
        ttt.FastWeightState.concat([])


def test_reset(model, x):
    state = fresh(model, x)
    state.reset()
    assert state.nbytes == 0 and len(state) == 0 and state.positions == []
    close(model(x[:2], state), model(x[:2]))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("cut", [*range(1, 2 * C + 3)])
def test_crop(model, x, cut, recorded):
    """Exactly as if the tokens had never come, or an error and no change."""
    seen = 3 * C + 5
    state = fresh(model)
    state.record_past(recorded)
    for part in (x[:, : C + 2], *x[:, C + 2 : seen].split(1, 1)):
        model(part, state)
    possible = recorded or cut <= 5
    if not possible:
        with pytest.raises(RuntimeError, match="behind a chunk boundary.*only 5 tokens"):
            state.crop(cut)
        assert state.positions == [seen] * 3
        return close(model(x[:, seen:], state), model(x)[:, seen:])
    state.crop(cut)
    assert state.positions == [seen - cut] * 3
    assert state.layers[1].columns == seen - cut
    close(model(x[:, seen - cut :], state), model(x)[:, seen - cut :])


def test_recording_keeps_the_latest_boundaries_only(model, x):
    """A long prompt is scanned; what `crop` reaches is what was kept, never a guess."""
    long = 0.5 * randn(1, 12 * C + 3, D)
    for count in (*range(1, 5 * C), 11 * C):
        state = fresh(model)
        state.record_past()
        model(long[:, : C + 1], state)
        model(long[:, C + 1 :], state)
        assert len(state.layers[0].rows[0].undo) == 4
        if count <= 4 * C + 3:
            state.crop(count)
            close(model(long[:, -count:], state), model(long)[:, -count:])
        else:
            with pytest.raises(RuntimeError, match="behind a chunk boundary"):
                state.crop(count)


def test_crop_twice_and_too_far(model, x):
    state = fresh(model)
    state.record_past()
    model(x[:, : 4 * C + 1], state)
    state.crop(2)
    state.crop(C)
    close(model(x[:, 3 * C - 1 :], state), model(x)[:, 3 * C - 1 :])
    with pytest.raises(RuntimeError, match="padding lies among them, or .* only"):
        state.crop(10 * C)
    assert state.positions == [x.shape[1]] * 3


def test_crop_does_not_guess_at_padding(model, x):
    state = fresh(model, x[:, :3])
    valid = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    for i, mlp in enumerate(model.layers):
        mlp(x[:, 3:5], BatchFacts(valid=valid, state=state.layers[i]))
    assert state.positions == [5, 4, 5]
    with pytest.raises(RuntimeError, match="padding lies among them"):
        state.crop(1)
    assert state.positions == [5, 4, 5]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rule", ["sgd", "conv", "specnorm"])
def test_save_and_load(tmp_path, x, rule, cut):
    model = Two(preserve_row_norm=True, **RULES[rule])
    state = fresh(model, x[:, :cut])
    state.reorder([1, 1, 0])
    path = tmp_path / "state.safetensors"
    state.save(path)
    loaded = ttt.FastWeightState.load(path, model)
    assert loaded.positions == state.positions and loaded.writes == state.writes
    rest = x[:, cut:]
    assert torch.equal(model(rest, loaded), model(rest, state))


def test_save_in_low_precision(tmp_path):
    model = Two(dtype=torch.bfloat16)
    state = fresh(model, randn(1, C + 3, D, dtype=torch.bfloat16))
    state.save(tmp_path / "state.safetensors")
    loaded = ttt.FastWeightState.load(tmp_path / "state.safetensors", model)
    row = loaded.layers[0].rows[0]
    assert row.weight[0].dtype == torch.float32 and row.chunk[0].dtype == torch.bfloat16


def test_load_refuses_other_models(tmp_path, x):
    path = tmp_path / "state.safetensors"
    fresh(Two(), x).save(path)

    def load(model):
        return ttt.FastWeightState.load(path, model)

    with pytest.raises(ValueError, match="layer 0, lr: 0.4 in the state, 0.5 in the model"):
        load(Two(lr=0.5))
    with pytest.raises(ValueError, match="inner_optimizer: 'sgd' in the state, 'specnorm' in"):
        load(Two(inner_optimizer="specnorm"))
    with pytest.raises(ValueError, match="chunk_size: 8 in the state, 16 in the model"):
        load(Two(chunk_size=16))
    other = Two()
    other.layers[1].down_proj.weight.data += 1
    with pytest.raises(ValueError, match="layer 1, the values of down_proj.weight"):
        load(other)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] in the state, \[0\] in the model"):
        load(Two().layers[:1])
    with pytest.raises(ValueError, match="must have fast-weight layers, got Linear"):
        load(nn.Linear(2, 2))


def test_load_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    model, path = Two(), tmp_path / "file"
    path.write_text("no such format")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        ttt.FastWeightState.load(path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold a saved FastWeightState"):
        ttt.FastWeightState.load(path, model)
    metadata = {"format": "ttt_kernels.state", "version": "99", "layers": json.dumps({})}
    save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match="format version 1, got version 99"):
        ttt.FastWeightState.load(path, model)
    with pytest.raises(FileNotFoundError):
        ttt.FastWeightState.load(tmp_path / "absent", model)


def test_what_it_tells(model, x):
    state = fresh(model, x[:, : C + 1])
    assert len(state) == 3 and state.positions == [C + 1] * 3
    assert state.writes == {0: [1] * 3, 1: [1] * 3} and state.refused == {0: [0] * 3, 1: [0] * 3}
    f = model.layers[0].intermediate_size
    weights = D * f + (D if model.layers[0].rule.preserve_row_norm else 0)
    assert state.nbytes == 2 * 3 * 8 * (weights + C * (D + f))
    assert "layers=[0, 1], positions=[9, 9, 9]" in repr(state)


def test_bad_arguments(model, x):
    state = fresh(model, x)
    with pytest.raises(IndexError, match=r"requests 0\.\.2, got \[0, 3\]"):
        state.select([0, 3])
    with pytest.raises(TypeError, match="expected a FastWeightState, got dict"):
        state.restore({})
    with pytest.raises(ValueError, match="of another model: layer 0, lr"):
        state.restore(fresh(Two(lr=9.0, preserve_row_norm=model.layers[0].rule.preserve_row_norm)))
    with pytest.raises(ValueError, match="must have been used by a patched model, got a list"):
        ttt.FastWeightState.of([])
    with pytest.raises(TypeError, match="must be a transformers Cache, got list"):
        state.attach([])


def test_streamed_rows_are_independent(x):
    mlp = layer()
    state = fresh(nn.ModuleList([mlp]))
    y = streamed(mlp, x, [C + 1, *[1] * (x.shape[1] - C - 1)], state.layers[0])
    for b in range(3):
        alone = fresh(nn.ModuleList([mlp]))
        z = streamed(mlp, x[b : b + 1], [C + 1, *[1] * (x.shape[1] - C - 1)], alone.layers[0])
        close(y[b : b + 1], z)
