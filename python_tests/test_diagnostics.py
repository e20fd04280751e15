"""`diagnostics`: the numbers are those of the writes, counted for the right layer, request and chunk."""

import re

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import ttt_kernels as ttt
from ttt_kernels.modules.state import FastWeightState

OPTIMIZERS = {
    "sgd": {},
    "specnorm": {"inner_optimizer": "specnorm", "lr": 0.5, "preserve_row_norm": True},
    "clip": {"inner_optimizer": "clip", "max_norm": 0.3, "lr": 0.5},
}


def model_of(**options):
    return tiny.patched(cfg=tiny.config(**options)).double()


def replayed(model, x: Tensor) -> list[tuple]:
    """(step, relative write, drift) of each layer, request and chunk, from what the layers saw."""
    seen, hooks = [], []
    for mlp in tiny.fast_mlps(model):
        hooks.append(
            mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[:2]))
        )
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [
        found
        for mlp, (z, u) in zip(tiny.fast_mlps(model), seen, strict=True)
        for b in range(len(x))
        for found in chunks(mlp, z[b : b + 1].detach(), u[b : b + 1].detach())
    ]


def chunks(mlp, z: Tensor, u: Tensor) -> list[tuple]:
    rule, w0, found = mlp.rule, mlp.down_proj.weight.detach(), []
    weight = w0.clone()
    v = ttt.next_token_target(u, mlp.ttt_proj.weight.detach(), chunk_size=rule.chunk_size)
    for n in range(z.shape[1] // rule.chunk_size):
        t = slice(n * rule.chunk_size, (n + 1) * rule.chunk_size)
        gradient, step = v[0, t].T @ z[0, t], rule.lr
        if rule.inner_optimizer == "specnorm":
            step = ttt.spectral_step_size(z[:, t], v[:, t], chunk_size=rule.chunk_size, lr=rule.lr)
            assert rule.lr / float(step) <= float(torch.linalg.matrix_norm(gradient, 2)) * (1 + 1e-6)
        if rule.inner_optimizer == "clip":
            step *= min(1, rule.max_norm / float(gradient.norm()))
        write = float(step) * gradient
        share = float(write.norm() / weight.norm())
        weight = weight + write
        found.append((float(step), share, float((weight - w0).norm() / w0.norm())))
    return found


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_numbers_are_those_of_the_writes(options):
    model, x = model_of(**options), tiny.ids(2, 3 * tiny.CHUNK + 5)
    report = ttt.diagnostics(model, x)
    want = replayed(model, x)
    assert len(report.rows) == len(want) == 2 * 2 * 3
    order = [(i, b, n) for i in tiny.LAYERS for b in range(2) for n in range(3)]
    for place, row, (step, share, drift) in zip(order, report.rows, want, strict=True):
        assert (row["layer"], row["request"], row["chunk"]) == place
        assert row["position"] == (place[2] + 1) * tiny.CHUNK and row["refused"] is False
        got = (row["step_size"], row["relative_write"], row["drift"])
        assert got == pytest.approx((step, share, drift), rel=1e-6)
        if options.get("inner_optimizer") == "specnorm":
            assert row["sigma"] == pytest.approx(model.config.ttt_lr / step)
        else:
            assert row["sigma"] is None
    assert report.refused == report.unrecorded == 0


def test_padding_moves_no_chunk():
    model, rows = model_of(), [tiny.ids(1, n, seed=n) for n in (29, 17)]
    x, mask, _ = tiny.pad(rows, "left")
    together = ttt.diagnostics(model, x, mask).rows
    for b, row in enumerate(rows):
        mine = [r for r in together if r["request"] == b]
        alone = ttt.diagnostics(model, row).rows
        assert len(mine) == len(alone) == 2 * (row.shape[1] // tiny.CHUNK)
        for got, want in zip(mine, alone, strict=True):
            assert got["position"] == want["position"]
            assert got["drift"] == pytest.approx(want["drift"], rel=1e-9)


def test_recording_while_generating():
    from transformers import DynamicCache

    model, x, cache = model_of(), tiny.ids(2, 20), DynamicCache()
    state = FastWeightState.for_model(model)
    state.record_writes()
    state.attach(cache)
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 15, "do_sample": False}
    y = model.generate(x, past_key_values=cache, **options)
    assert torch.equal(y, model.generate(x, **options))
    for source in (cache, state):
        rows = ttt.diagnostics(source).rows
        assert rows == ttt.diagnostics(cache).rows and len(rows) == 2 * 2 * 4
    whole = ttt.diagnostics(model, y[:, :-1]).rows
    assert [r["drift"] for r in rows] == pytest.approx([r["drift"] for r in whole], rel=1e-9)
    state.record_writes(False)
    with torch.no_grad():
        model(tiny.ids(2, 8), past_key_values=cache)
    report = ttt.diagnostics(state)
    assert report.rows == rows and report.unrecorded == 4
    assert "4 writes were not recorded: call record_writes()" in str(report)


def test_refused_writes_are_counted(tmp_path):
    """Broken projections: every write is refused, and the model reads its slow weights."""
    model, x = tiny.patched(), tiny.ids(1, 20)
    for mlp in tiny.fast_mlps(model):
        mlp.ttt_proj.weight.data[0, 0] = float("inf")
    report = ttt.diagnostics(model, x)
    assert report.refused == len(report.rows) == 4 and all(r["refused"] for r in report.rows)
    assert all(r["drift"] == 0 for r in report.rows)
    assert re.search(r"^ +0 +0 +0 +2( +-){5}$", str(report), re.M)
    with torch.no_grad():
        out = model(x)
        with ttt.disabled(model):
            torch.testing.assert_close(out.logits, model(x, use_cache=False).logits)
    unrecorded = ttt.diagnostics(out.past_key_values)
    assert (unrecorded.refused, unrecorded.unrecorded, unrecorded.rows) == (4, 4, [])
    with pytest.raises(ValueError, match="recorded writes to draw, got none.*record_writes"):
        unrecorded.plot(tmp_path / "never.png")
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "refused.png")


def test_table_and_picture(tmp_path):
    model, x = model_of(**OPTIMIZERS["specnorm"]), tiny.ids(3, 4 * tiny.CHUNK)
    report = ttt.diagnostics(model, x)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 2 * 3 + 2 and len({len(line) for line in lines[:7]}) == 1
    assert lines[-1].startswith("largest drift") and "at token 32" in lines[-1]
    assert "No chunk has been completed" in str(ttt.diagnostics(model, x[:, :3]))
    many = ttt.diagnostics(model, tiny.ids(30, tiny.CHUNK))
    assert "... 20 more in .requests" in str(many)
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "writes.png")
    assert (tmp_path / "writes.png").stat().st_size > 10_000


def test_closed_form_writes_are_one_record():
    model, x = model_of(), tiny.ids(2, 20)
    with ttt.adapt(model, x) as adapted:
        rows = ttt.diagnostics(adapted.state).rows
        assert [(r["layer"], r["request"]) for r in rows] == [(i, b) for i in tiny.LAYERS for b in (0, 1)]
        assert all(r["chunk"] == 0 and r["position"] == 20 for r in rows)
        for row in rows:
            eta, delta = (values[row["layer"]][row["request"]] for values in (adapted.etas, adapted.deltas))
            assert row["step_size"] == eta and row["relative_write"] == pytest.approx(eta * delta)


def test_bad_arguments():
    model, x = model_of(), tiny.ids(1, 9)
    with pytest.raises(TypeError, match="input_ids must be given with a model"):
        ttt.diagnostics(model)
    with pytest.raises(TypeError, match="need a model"):
        ttt.diagnostics(FastWeightState.for_model(model), x)
    with pytest.raises(TypeError, match="must be a patched model, .*got int"):
        ttt.diagnostics(3)
    with pytest.raises(ValueError, match="must have been patched"):
        ttt.diagnostics(tiny.build(), x)
    with pytest.raises(ValueError, match="call model.eval"):
        ttt.diagnostics(tiny.patched().train(), x)
    with pytest.raises(ValueError, match="must not be disabled"), ttt.disabled(model):
        ttt.diagnostics(model, x)
