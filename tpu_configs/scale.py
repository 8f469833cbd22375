"""How a step grows: plans variants of one small run and writes the table in README.md.

python tpu_configs/scale.py      about 15 minutes on 2 cores
"""

from dataclasses import replace
from pathlib import Path

from jclt.coders import CoderConfig
from jclt.models import known_config
from jclt.pods import Pod, plan_step
from jclt.pods.chips import GIB
from jclt.training.config import TrainConfig

TABLE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- growth -->\n", "<!-- end of growth -->\n"
MODEL = known_config("google/gemma-2-2b")
HEAD = (
    "| | layers | features a layer | chips | tokens a step | step, s | of peak | memory a chip, GiB | "
    "sent a chip and step, GB | waited for links | compiled in, s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)
BASE = TrainConfig(
    CoderConfig(features=24_576), "google/gemma-2-2b", batch=256, length=128, micro_batches=4, compute="bfloat16"
)


def make_variant(
    layers: int = 8, features: int = 24_576, topology: str = "v5e:8x8", slices: int = 1, batch: int = 256
) -> tuple[TrainConfig, Pod]:
    local = tuple(layer for layer in MODEL.local_layers if layer < layers)
    model = replace(MODEL, layers=layers, local_layers=local)
    coder = replace(BASE.coder, features=features)
    return replace(BASE, coder=coder, batch=batch, data_shards=slices), Pod(topology, slices, model)


CASES = {
    "base": make_variant(),
    "features x2": make_variant(features=49_152),
    "features x4": make_variant(features=98_304),
    "layers x1/2": make_variant(layers=4),
    "layers x2": make_variant(layers=16),
    "chips and features x4": make_variant(features=98_304, topology="v5e:16x16"),
    "the same, 2 slices, tokens x2": make_variant(features=98_304, topology="v5e:16x16", slices=2, batch=512),
    "the same, 4 slices, tokens x4": make_variant(features=98_304, topology="v5e:16x16", slices=4, batch=1024),
}


def main() -> None:
    rows = ""
    for name, (config, pod) in CASES.items():
        plan = plan_step(config, pod)
        sent = sum(entry["bytes"] for entry in plan["traffic"]) / 1e9
        assert pod.model is not None
        cells = [
            name,
            pod.model.layers,
            f"{config.coder.features:,}",
            plan["chips"],
            f"{plan['tokens_per_step']:,}",
            f"{plan['seconds']:.3f}",
            f"{plan['utilisation']:.0%}",
            f"{plan['memory']['total'] / GIB:.1f}",
            f"{sent:.1f}",
            f"{plan['exposed_seconds'] / plan['seconds']:.0%}",
            f"{plan['compile_seconds']:.0f}",
        ]
        rows += f"| {' | '.join(map(str, cells))} |\n"
        print(rows.splitlines()[-1], flush=True)
    before, _, from_table = TABLE.read_text().partition(BEGIN)
    TABLE.write_text(f"{before}{BEGIN}{HEAD}{rows}{END}{from_table.partition(END)[2]}")


if __name__ == "__main__":
    main()
