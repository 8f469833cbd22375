"""The same run on other meshes, in other micro-batches, with and without rematerialisation."""

from collections.abc import Iterator
from dataclasses import replace

from jclt.pods.chips import chips_in
from jclt.pods.slices import Pod
from jclt.training.config import TrainConfig

MICRO = (0.5, 1.0, 2.0)
SHARDS = (1, 2, 4)


def variants(config: TrainConfig, pod: Pod) -> Iterator[TrainConfig]:
    """Data shards times micro-batches times rematerialisation, around what the configuration says."""
    chips = chips_in(pod.topology) * pod.slices
    for shards in SHARDS:
        data = shards * pod.slices
        if chips % data or config.coder.features % (chips // data):
            continue
        for factor in MICRO:
            micro = int(config.micro_batches * factor)
            if micro < 1 or config.length % micro:
                continue
            for remat in (False, True):
                yield replace(config, data_shards=data, micro_batches=micro, remat=remat)
