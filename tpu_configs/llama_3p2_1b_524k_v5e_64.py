"""Llama 3.2 1B, 524 thousand features, on 64 chips of v5e.

jclt plan tpu_configs/llama_3p2_1b_524k_v5e_64.py
jclt train tpu_configs/llama_3p2_1b_524k_v5e_64.py --out gs://BUCKET/llama_3p2_1b_524k_v5e_64
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=32_768),
    model="meta-llama/Llama-3.2-1B",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=256,
    length=256,
    micro_batches=8,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5e:8x8")
