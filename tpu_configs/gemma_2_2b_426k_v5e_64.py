"""Gemma 2 2B, 426 thousand features, on 64 chips of v5e.

    jclt plan tpu_configs/gemma_2_2b_426k_v5e_64.py
    jclt train tpu_configs/gemma_2_2b_426k_v5e_64.py --out gs://BUCKET/gemma_2_2b_426k_v5e_64

Two data shards: with 256 features a chip the sums would travel for longer than they are worked on.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=16_384),
    model="google/gemma-2-2b",
    data="gs://BUCKET/tokens",
    steps=7_629,  # a billion tokens
    batch=512,
    length=256,
    micro_batches=16,
    data_shards=2,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5e:8x8")
