"""Gemma 2 2B, 2.56 million features, on 256 chips of v5e.

jclt plan tpu_configs/gemma_2_2b_2p5m_v5e_256.py
jclt train tpu_configs/gemma_2_2b_2p5m_v5e_256.py --out gs://BUCKET/gemma_2_2b_2p5m_v5e_256

Two data shards: half as much to send for each product, at the price of gradients that travel once a step.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=98_304),
    model="google/gemma-2-2b",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=512,
    length=128,
    micro_batches=8,
    data_shards=2,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5e:16x16")
