"""Attribution graphs: exact edges by `jax.vjp` of the local replacement model, many prompts at once.

Axis letters of this package, beside those of `shapes.py`: C covered layers; n features in a layer's list; G groups of
tiles, K tiles of a group, S slots of a tile (`sweep/tiles.py`); M blocks, R targets of a block (`sweep/edges.py`); m
layers below the cut, N blocks of sources there, s sources of a block (`sweep/columns.py`); k outputs.
"""

from jclt.attribution.attribute import attribute, attribute_batch, attribute_each
from jclt.attribution.many_prompts import attribute_file
from jclt.attribution.options import Options
from jclt.attribution.targets import Direction, Target

__all__ = ["Direction", "Options", "Target", "attribute", "attribute_batch", "attribute_each", "attribute_file"]
