"""The preset smollm2-transcoders on 4 chips of v5e.

jclt plan tpu_configs/smollm2_transcoders_v5e_4.py
jclt train tpu_configs/smollm2_transcoders_v5e_4.py --out gs://BUCKET/smollm2_transcoders_v5e_4
"""

from dataclasses import replace

from jclt.pods import Pod
from jclt.training.presets import smollm2_transcoders

config = replace(smollm2_transcoders(), data="gs://BUCKET/tokens")
pod = Pod("v5e:2x2")
