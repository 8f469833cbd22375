"""What the train step may send between devices."""

import math
from collections import Counter

from jclt.coders import abstract_coder
from jclt.pods.hlo import Collective, collectives
from jclt.training.config import TrainConfig


def check_step(text: str, config: TrainConfig, data: int, features: int) -> list[Collective]:
    """Asserts what the step sends on a mesh of data x features devices, and returns the coder's part of it.

    The sizes in the configuration must differ from one another, so that a shape says what its axes are.
    """
    c = config.coder
    layers, width, own = len(c.covered), c.size, c.features // features
    tokens = config.batch * config.length // data // config.micro_batches
    everything = collectives(text)
    coder = [one for one in everything if "/harvest/" not in one.source]
    sums = [one for one in coder if one.kind == "all-reduce"]
    report = "\n".join(map(str, coder))

    harvest = [one for one in everything if one not in coder]
    assert {one.kind for one in coder} == {"all-reduce", "all-gather"}, report
    assert {one.kind for one in harvest} <= {"all-gather", "all-reduce", "all-to-all"}, report

    # Inputs go to all feature shards once a micro-batch, the first ones before the loop over them; the errors'
    # gradients come back once; no more is gathered.
    whole, rounds = tokens * layers * width, 2 if config.micro_batches == 1 else 3
    assert (
        sum(math.prod(shape) for one in coder if one.kind == "all-gather" for shape in one.shapes) == rounds * whole
    ), report

    # The partial reconstructions are added up once a micro-batch, each layer's when it is complete or all together.
    partial_sums = [one for one in sums if one.has_axis(tokens)]
    assert len(partial_sums) <= layers, report
    assert sum(math.prod(shape) for one in partial_sums for shape in one.shapes if tokens in shape) == whole, report

    # No array of all features travels, and on feature shards alone none of a shard's own either. Between data shards
    # the gradients of its matrices do, once a step; in the loop over micro-batches only vectors.
    assert not any(one.has_axis(c.features) for one in everything), report
    of_features = [one for one in coder if one.has_axis(own)]
    assert data > 1 or not of_features, report
    matrices = [one for one in of_features if any(own in shape and len(shape) > 1 for shape in one.shapes)]
    if data > 1:
        assert not any("/while/" in one.source for one in matrices), report
        weights = [x for layer in abstract_coder(c).layers for x in (layer.encoder, layer.decoder)]
        shapes = [shape for one in matrices for shape in one.shapes if own in shape and len(shape) > 1]
        travelled = Counter(map(math.prod, shapes))
        assert travelled == Counter(x.size // features for x in weights if x is not None), report

    # The rest is small, and there is little of it.
    rest = [one for one in sums if one not in partial_sums and one not in of_features]
    assert all(one.largest <= layers * width for one in rest), report
    assert len(rest) <= 6 and len(of_features) <= 4, report
    return coder
