"""What patching leaves alone around the decoder: shared configs, and the module it went through."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch

import ttt_kernels as ttt
from ttt_kernels.patch.cache import PREPARE


def test_models_of_one_config_keep_their_own_fields(tmp_path):
    a = tiny.build()
    config = a.config
    b = type(a)(config).eval()
    before = copy.deepcopy(vars(config))
    ttt.patch_model(a, tiny.config())
    ttt.patch_model(b, tiny.config(lr=1.0))
    assert vars(config) == before
    for model, lr in ((a, 2.0), (b, 1.0)):
        assert model.config is model.model.config is model.model.layers[0].self_attn.config
        assert ttt.TTTConfig.from_hf_config(model.config).lr == lr
    ttt.unpatch_model(a)
    assert a.config is config and a.model.config is config
    assert ttt.TTTConfig.from_hf_config(b.config).lr == 1.0
    b.save_pretrained(tmp_path)
    assert ttt.TTTConfig.from_hf_config(type(config).from_pretrained(tmp_path)).lr == 1.0
    ttt.unpatch_model(b)
    assert all(vars(m).get("config", config) is config for m in (*a.modules(), *b.modules()))
    assert vars(config) == before


@pytest.mark.parametrize("through", ["outer", "inner", "inner then outer"])
@pytest.mark.parametrize("back", ["outer", "inner"])
def test_patched_through_one_module_and_unpatched_through_another(through, back):
    model = tiny.build()
    config = model.config
    plain = {n: sorted(vars(m)) for n, m in model.named_modules()}
    report = ttt.patch_model(model if through == "outer" else model.model, tiny.config())
    if through == "inner then outer":
        assert ttt.patch_model(model) is report
    if through != "inner":
        assert PREPARE in vars(model) and model.config is model.model.config
        with torch.no_grad():
            model.generate(tiny.ids(1, 9), max_new_tokens=2, do_sample=False)
    ttt.unpatch_model(model if back == "outer" else model.model)
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == plain
    assert all(vars(m).get("config", config) is config for m in model.modules())


@torch.no_grad()
def test_a_call_that_fails_in_a_layer_leaves_nothing_behind():
    model, x = tiny.patched(), tiny.ids(1, 13)
    layer = model.model.layers[0]
    cache = model(x).past_key_values
    state = ttt.FastWeightState.of(cache)

    def fail(*args):
        raise KeyError("inside the layer")

    handle = layer.post_attention_layernorm.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="inside the layer"):
        model(x, past_key_values=cache)
    handle.remove()
    positions = state.positions
    layer.mlp(torch.zeros(1, 4, 64))
    assert state.positions == positions


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_made_inside_disabled_are_not_disabled(clone):
    torch._dynamo.reset()
    model, x = tiny.patched(), tiny.ids(2, 30)
    with ttt.disabled(model):
        twin = clone(model)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits)
    torch._dynamo.reset()


def test_diagnostics_names_the_shape_it_wants():
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, T\], got \(30,\)"):
        ttt.diagnostics(tiny.patched(), tiny.ids(1, 30)[0])
