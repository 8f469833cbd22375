"""The products that cost the time: dense, and of active features alone.

Terms of this package:
- active pair: a (token, feature) at which a feature is active, or may have a gradient (`active.py`).
- capacity: how many active pairs a buffer holds, for each token and device on average. A slot holds one pair.
- group: the pairs of one token, or of one feature. `row_sums.py` adds up rows of a table group by group.
"""
