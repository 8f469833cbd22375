"""Gemma 2 2B, a transcoder of each of its 26 layers with 426 thousand features in all, on 16 chips of v5e.

    jclt plan tpu_configs/gemma_2_2b_transcoders_v5e_16.py
    jclt train tpu_configs/gemma_2_2b_transcoders_v5e_16.py --out gs://BUCKET/gemma_2_2b_transcoders_v5e_16

As many features as the public transcoders of this model have. In bfloat16 they fit on one chip beside the model, so
that each chip can trace graphs by itself.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig("transcoder", features=16_384),
    model="google/gemma-2-2b",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=256,
    length=256,
    micro_batches=16,
    compute="bfloat16",
)
pod = Pod("v5e:4x4")
