"""The operations, one folder each: reference (specification), implementations, api.

A newcomer reads `api.py` (what it computes), then `reference.py` (the formula, literally), then
one implementation. `registration.py` makes torch ops of the implementations.
"""
