"""Putting fast weights into transformers models. The only place that knows transformers.

`config.TTTConfig` says which layers write and how, `families` lists the supported models as rows of
one table, `hooks` carries each call's facts to the layers, `model` patches and unpatches,
`checkpoint` saves and loads.
"""
