"""The same run on other meshes, in other micro-batches, with and without rematerialisation."""

from collections.abc import Iterator
from dataclasses import replace

from jclt.pods.chips import count_chips
from jclt.pods.slices import Pod
from jclt.training.config import TrainConfig

MICRO_BATCH_FACTORS = (0.5, 1.0, 2.0)
DATA_SHARD_COUNTS = (1, 2, 4)


def list_variants(config: TrainConfig, pod: Pod) -> Iterator[TrainConfig]:
    """All combinations of data shards, micro-batches and rematerialisation near those of the configuration."""
    chips = count_chips(pod.topology) * pod.slices
    for shards in DATA_SHARD_COUNTS:
        data = shards * pod.slices
        if chips % data or config.coder.features % (chips // data):
            continue
        for factor in MICRO_BATCH_FACTORS:
            micro = int(config.micro_batches * factor)
            if micro < 1 or config.length % micro:
                continue
            for remat in (False, True):
                yield replace(config, data_shards=data, micro_batches=micro, remat=remat)
