"""The command line: `python -m ttt_kernels info | demo | generate | bench`. The only place that
prints.

`main` parses and dispatches, `demo*`, `generate*` and `bench*` do the work, `fast_weights` has the
options of a patched model, `measure` is the stopwatch and the memory meter.
"""
