"""The command line: `python -m ttt_kernels info | demo | bench`. The only place that prints.

`main` parses and dispatches, `demo*` and `bench*` do the work, `measure` is the stopwatch and the
memory meter of both.
"""
