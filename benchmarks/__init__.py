"""How fast we are, beside the peers, in the same run: `python -m benchmarks`.

One module for each question. Each tells its peers and the reference result; `timing` checks every
peer's result against it, and only then times them, in turn.
"""
