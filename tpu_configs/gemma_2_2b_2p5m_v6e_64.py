"""Gemma 2 2B, 2.48 million features, on 64 chips of v6e.

jclt plan tpu_configs/gemma_2_2b_2p5m_v6e_64.py
jclt train tpu_configs/gemma_2_2b_2p5m_v6e_64.py --out gs://BUCKET/gemma_2_2b_2p5m_v6e_64

A little fewer features than on v5e, or less than 8% of the memory would stay free.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=95_232),
    model="google/gemma-2-2b",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=512,
    length=128,
    micro_batches=8,
    compute="bfloat16",
)
pod = Pod("v6e:8x8")
