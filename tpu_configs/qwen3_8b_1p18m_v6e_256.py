"""Qwen3 8B, 1.18 million features, TopK over all layers together, on 256 chips of v6e.

    jclt plan tpu_configs/qwen3_8b_1p18m_v6e_256.py
    jclt train tpu_configs/qwen3_8b_1p18m_v6e_256.py --out gs://BUCKET/qwen3_8b_1p18m_v6e_256

Four data shards: with 128 features a chip the sums would travel for longer than they are worked on.
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=32_768, activation="batchtopk", k=256),
    model="Qwen/Qwen3-8B",
    data="gs://BUCKET/tokens",
    steps=3_815,  # a billion tokens
    batch=1024,
    length=256,
    micro_batches=16,
    data_shards=4,
    sparsity="none",
    moment_dtype="bfloat16",
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v6e:16x16")
