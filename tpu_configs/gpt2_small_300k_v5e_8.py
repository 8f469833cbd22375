"""GPT-2 small, 295 thousand features, on 8 chips of v5e.

jclt plan tpu_configs/gpt2_small_300k_v5e_8.py
jclt train tpu_configs/gpt2_small_300k_v5e_8.py --out gs://BUCKET/gpt2_small_300k_v5e_8
"""

from jclt.coders import CoderConfig
from jclt.pods import Pod
from jclt.training.config import TrainConfig

config = TrainConfig(
    CoderConfig(features=24_576),
    model="gpt2",
    data="gs://BUCKET/tokens",
    steps=61_035,  # a billion tokens
    batch=128,
    length=128,
    micro_batches=4,
    beta1=0.0,  # Adam then keeps no first moment, which takes memory
    compute="bfloat16",
)
pod = Pod("v5e:2x4")
