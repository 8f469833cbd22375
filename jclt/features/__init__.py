"""What a feature is: where it fires in data, and what its weights say.

Reading order: `columns.py` (the files), `records.py` (one feature read from them), `describe.py` (the pass over data
and weights; `rows.py` are its rows, `progress.py` its folder), `block_events.py` and `events.py` (where features fire,
listed on the device), `tally.py` (all counts), `best_examples.py` and `frequent_tokens.py` (the parts of them that keep
only the best), `weights.py` (what follows from weights alone), `viewer_files.py` (the JSON of published viewers).

Labels: `labels.py` (their file), `label.py` (finds and scores them, with `windows.py`, `rules.py`, `rule_labels.py`,
`scores.py`, `weight_labels.py`; by a language model `endpoint.py`, `endpoint_labels.py`), `concepts.py` with
`statements.py` (of the small world), `group_names.py` (of groups of features).
"""

from jclt.features.columns import BIN_EDGES, COLUMNS, Sizes
from jclt.features.describe import describe_features
from jclt.features.label import label_features
from jclt.features.labels import Label, load_labels, merge_labels, save_labels
from jclt.features.records import Example, FeatureRecord, Features, load_features, summarize
from jclt.features.viewer_files import export_bundle, export_features, read_bundle, read_feature_file

__all__ = [
    "BIN_EDGES",
    "COLUMNS",
    "Example",
    "FeatureRecord",
    "Features",
    "Label",
    "Sizes",
    "describe_features",
    "export_bundle",
    "export_features",
    "label_features",
    "load_features",
    "load_labels",
    "merge_labels",
    "read_bundle",
    "read_feature_file",
    "save_labels",
    "summarize",
]
