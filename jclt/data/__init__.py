"""Data for training and evaluation.

`documents.py` reads text of any format. `tokenize.py` turns it into token shards; their manifest (`manifest.py`) tells
how they were made. `load_tokens.py` loads them as rows (`token_rows.py`), and `batches.py` picks the rows of a step and
places them on devices. `prefetch.py` does such work ahead of time. `activation_store.py` keeps harvested activations.
"""
