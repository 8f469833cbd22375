"""What the train step may send between devices."""

import math
from collections import Counter

from jclt.coders import abstract_coder
from jclt.pods.collectives import Collective, find_collectives
from jclt.training.config import TrainConfig


def check_step(text: str, config: TrainConfig, data: int, features: int) -> list[Collective]:
    """Asserts what the step sends on a mesh of data x features devices, and returns the coder's part of it.

    The sizes in the configuration must differ from one another, so that a shape says what its axes are.
    """
    c = config.coder
    layers, width, shard_features = len(c.covered), c.size, c.features // features
    tokens = config.batch * config.length // data // config.micro_batches
    everything = find_collectives(text)
    coder = [op for op in everything if "/harvest/" not in op.source]
    sums = [op for op in coder if op.kind == "all-reduce"]
    report = "\n".join(map(str, coder))

    harvest = [op for op in everything if op not in coder]
    assert {op.kind for op in coder} == {"all-reduce", "all-gather"}, report
    assert {op.kind for op in harvest} <= {"all-gather", "all-reduce", "all-to-all"}, report

    # Inputs go to all feature shards once a micro-batch, the first ones before the loop over them; the errors'
    # gradients come back once; no more is gathered.
    inputs_size, rounds = tokens * layers * width, 2 if config.micro_batches == 1 else 3
    assert (
        sum(math.prod(shape) for op in coder if op.kind == "all-gather" for shape in op.shapes) == rounds * inputs_size
    ), report

    # The partial reconstructions are added up once a micro-batch, each layer's when it is complete or all together.
    partial_sums = [op for op in sums if op.has_axis(tokens)]
    assert len(partial_sums) <= layers, report
    assert sum(math.prod(shape) for op in partial_sums for shape in op.shapes if tokens in shape) == inputs_size, report

    # No array of all features travels, and on feature shards alone none of all features of a shard. Between data shards
    # the gradients of its matrices do, once a step; in the loop over micro-batches only vectors.
    assert not any(op.has_axis(c.features) for op in everything), report
    of_features = [op for op in coder if op.has_axis(shard_features)]
    assert data > 1 or not of_features, report
    matrices = [op for op in of_features if any(shard_features in shape and len(shape) > 1 for shape in op.shapes)]
    if data > 1:
        assert not any("/while/" in op.source for op in matrices), report
        weights = [x for layer in abstract_coder(c).layers for x in (layer.encoder, layer.decoder)]
        shapes = [shape for op in matrices for shape in op.shapes if shard_features in shape and len(shape) > 1]
        travelled = Counter(map(math.prod, shapes))
        assert travelled == Counter(x.size // features for x in weights if x is not None), report

    # The rest is small, and there is little of it.
    small = [op for op in sums if op not in partial_sums and op not in of_features]
    assert all(op.largest <= layers * width for op in small), report
    assert len(small) <= 6 and len(of_features) <= 4, report
    return coder
