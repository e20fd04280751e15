"""Kernels for in-place test-time training: MLP down-projections as fast weights.

    import ttt_kernels as ttt
    y, state = ttt.fast_weight_scan(z, v, w0, chunk_size=1024, step_size=0.3)
    report = ttt.patch_model(model, ttt.TTTConfig.recipe("llama-3.1-8b"))

Names are imported when first used: `import ttt_kernels` itself loads torch and nothing else.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fast_weight_scan": "ttt_kernels.ops.scan.api",
    "fast_weight_apply": "ttt_kernels.ops.step.api",
    "fast_weight_update_": "ttt_kernels.ops.step.api",
    "next_token_target": "ttt_kernels.ops.target.api",
    "conv_target": "ttt_kernels.ops.target.api",
    "spectral_step_size": "ttt_kernels.ops.step_size.api",
    "clipped_step_size": "ttt_kernels.ops.step_size.api",
    "ridge_write": "ttt_kernels.ops.ridge.api",
    "ridge_write_from_outputs": "ttt_kernels.ops.ridge.api",
    "FastWeightMLP": "ttt_kernels.modules.mlp",
    "FastWeightState": "ttt_kernels.modules.state",
    "TTTConfig": "ttt_kernels.patch.config",
    "patch_model": "ttt_kernels.patch.model",
    "unpatch_model": "ttt_kernels.patch.model",
    "save_pretrained": "ttt_kernels.patch.checkpoint",
    "from_pretrained": "ttt_kernels.patch.checkpoint",
    "save_projections": "ttt_kernels.patch.checkpoint",
    "load_projections": "ttt_kernels.patch.checkpoint",
    "disabled": "ttt_kernels.patch.hooks",
    "adapt": "ttt_kernels.patch.adapt",
    "diagnostics": "ttt_kernels.patch.diagnose",
    "info": "ttt_kernels._info",
}

__all__ = [*_PUBLIC, "distributed", "testing", "__version__"]


def __getattr__(name: str):
    if name in ("distributed", "testing"):
        return import_module(f"ttt_kernels.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ttt_kernels' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
