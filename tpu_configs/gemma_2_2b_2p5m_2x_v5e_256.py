"""Gemma 2 2B, 2.56 million features, on two slices of 256 chips of v5e, which share the tokens.

    jclt plan tpu_configs/gemma_2_2b_2p5m_2x_v5e_256.py
    jclt train tpu_configs/gemma_2_2b_2p5m_2x_v5e_256.py --out gs://BUCKET/gemma_2_2b_2p5m_2x_v5e_256

Between slices only gradients travel, once a step: many tokens a step keep that small.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=98_304),
    model="google/gemma-2-2b",
    data="gs://BUCKET/tokens",
    steps=3_815,  # a billion tokens
    batch=1024,
    length=256,
    micro_batches=16,
    data_shards=2,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5e:16x16", slices=2)
