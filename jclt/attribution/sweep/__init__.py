"""The sweep: edges from features and errors into targets, on the device.

`bases.py` says what the nodes of a prompt read and write, `tiles.py` where what they write lies in arrays, `folding.py`
makes norms a part of weights and patterns, and `nodes.py` folds the nodes. `edges.py` carries targets down through the
layers, past the heads and residual streams that are nodes (`vectors.py`, `vector_edges.py`); `cuts.py` chooses a layer
where they meet the sources that `columns.py` carries up. `blocks.py` says which of them are carried together.
"""
