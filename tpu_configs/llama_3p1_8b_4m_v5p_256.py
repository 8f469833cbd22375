"""Llama 3.1 8B, 4.19 million features, on 128 chips of v5p (v5p-256 counts cores).

jclt plan tpu_configs/llama_3p1_8b_4m_v5p_256.py
jclt train tpu_configs/llama_3p1_8b_4m_v5p_256.py --out gs://BUCKET/llama_3p1_8b_4m_v5p_256
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=131_072),
    model="meta-llama/Llama-3.1-8B",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=256,
    length=256,
    micro_batches=8,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5p:4x4x8")
