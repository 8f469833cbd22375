"""The method paper's size class, 10 million features over 18 layers, on 128 chips of v5p (v5p-256 counts cores).

    jclt plan tpu_configs/method_paper_10m_v5p_256.py
    jclt train tpu_configs/method_paper_10m_v5p_256.py --out gs://BUCKET/method_paper_10m_v5p_256

The paper does not tell its model's width, nor anything else of its shape: all of `model` is assumed.
"""

from jclt.coders import CoderConfig
from jclt.models import ModelConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

model = ModelConfig("llama", vocabulary=65_536, width=2048, layers=18, heads=16, mlp_width=8192, context=4096)
config = TrainConfig(
    CoderConfig(features=557_056),
    model="18-layer model",
    data="gs://BUCKET/tokens",
    steps=15_259,  # a billion tokens
    batch=256,
    length=256,
    micro_batches=8,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5p:4x4x8", model=model)
