"""Gemma 2 2B, 2.56 million features, on 64 chips of v6e.

jclt plan tpu_configs/gemma_2_2b_2p5m_v6e_64.py
jclt train tpu_configs/gemma_2_2b_2p5m_v6e_64.py --out gs://BUCKET/gemma_2_2b_2p5m_v6e_64
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
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v6e:8x8")
