"""Gemma 2 9B, 5.16 million features, on 128 chips of v5p (v5p-256 counts cores).

jclt plan tpu_configs/gemma_2_9b_5m_v5p_256.py
jclt train tpu_configs/gemma_2_9b_5m_v5p_256.py --out gs://BUCKET/gemma_2_9b_5m_v5p_256
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=122_880),
    model="google/gemma-2-9b",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=256,
    length=256,
    micro_batches=8,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5p:4x4x8")
