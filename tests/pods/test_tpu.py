"""The train step compiled for TPUs, without a TPU: it fits, and it sends what it should. Needs libtpu."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jclt.cli.main import main
from jclt.config import load_settings
from jclt.pods import load_pod, plan_step
from jclt.pods.worker import ENVIRONMENT
from jclt.training.config import TrainConfig

# Layers, features a layer, and the mesh. In the first the sums over source layers are contracted as one product, with
# 384 features a chip; in the others, with 1,024 and 2,560, source by source.
CASES = {
    "joined": (2, 6_144, 1, 16),
    "by source": (4, 16_384, 1, 16),
    "by source on two data shards": (2, 20_480, 2, 8),
}
TOPOLOGY, MEMORY = "v5e:4x4", 15.75
pytestmark = pytest.mark.optimized
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is missing: pip install 'jclt[tpu]'")


@needs_libtpu
@pytest.mark.parametrize(
    "case", ["joined", pytest.param("by source", marks=pytest.mark.exhaustive), "by source on two data shards"]
)
def test_the_step_compiles_for_a_tpu_and_fits(case):
    command = [sys.executable, __file__, case]
    process = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout.splitlines()[-1])
    print(f"\n{case}: {report['memory']} GiB")
    print(*report["collectives"], sep="\n")
    memory = report["memory"]
    assert sum(memory.values()) < MEMORY
    assert memory["new outputs"] < 0.001  # the state is updated in place


@needs_libtpu
@pytest.mark.parametrize(
    "topology",
    [
        "v5e:2x2",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("v5p:2x2x1", "v6e:2x2")),
        "tpu7x:2x2x1",
    ],
)
def test_the_kernels_of_the_sparse_path_compile_for_each_chip(topology):
    """Several lists for the TensorCore; one list for SparseCores, which v5e lacks."""
    process = subprocess.run(
        [sys.executable, __file__, topology], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout.splitlines()[-1])
    print(f"\n{topology}: {report}")
    on_tensor_core = {"kernels": ["row_sums", "row_products"], "on SparseCores": False}
    assert report["26 layers"] == on_tensor_core
    assert report["one layer"] == on_tensor_core | {"on SparseCores": topology != "v5e:2x2"}


@needs_libtpu
@pytest.mark.exhaustive  # minutes of a processor; the test below plans a small step in the same way
@pytest.mark.parametrize("name", ["gpt2_small_300k_v5e_8", "llama_3p2_1b_524k_v5e_64"])
def test_the_small_configurations_are_planned_as_their_table_says(name):
    path = Path(__file__).parents[2] / "tpu_configs" / f"{name}.py"
    plan = json.loads(path.with_name("plans.json").read_text())[name]
    report = plan_step(load_settings(str(path), TrainConfig, {}), load_pod(str(path), None, None))
    print(f"\n{name}: {report['seconds'] * 1e3:.1f} ms, {report['utilisation']:.1%}, {report['compile_seconds']:.0f} s")
    assert report["memory"]["headroom"] > 0.08
    assert report["seconds"] == pytest.approx(plan["seconds"], rel=0.1)
    assert report["floors"]["products"] < report["seconds"] and report["floors"]["memory"] < report["seconds"]
    assert sum(report["stages"].values()) + report["exposed_seconds"] == pytest.approx(report["seconds"])


@needs_libtpu
def test_a_plan_from_the_command_line(tmp_path, capsys):
    settings = "coder.features=16384 batch=32 length=128 micro_batches=2 compute=bfloat16".split()
    arguments = ["tiny", "--topology", "v5e:4x4", "--json", str(tmp_path / "plan.json")]
    arguments += ["--active", "100"]
    assert main(["plan", *arguments, *(part for setting in settings for part in ("--set", setting))]) == 2
    assert "expected at most 64" in capsys.readouterr().err  # the model's context
    settings[2] = "length=64"
    assert main(["plan", *arguments, *(part for setting in settings for part in ("--set", setting))]) == 0
    text, report = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "not a measurement" in text
    assert "sparse path       at 100 active features a token, of all layers (capacity 3 a token" in text
    sparse = report["sparse"]
    assert 0 < sparse["kernel_seconds"] < sparse["seconds"] and f"{report['seconds'] / sparse['seconds']:.2f}" in text
    assert report["calibration"]["product"] == pytest.approx(1.14, abs=0.1)
    assert report["calibration"]["copy"] == pytest.approx(1.24, abs=0.1)
    assert report["calibration"]["all-reduce"] == pytest.approx(1.0)


@needs_libtpu
def test_graphs_are_planned_for_each_place_of_a_coder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1")  # the compiler spends no time on making them fast
    arguments = ["tiny", "--topology", "v5e:4x4", "--set", "coder.features=16384"]
    arguments += ["--graphs", "--prompt-length", "16", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", *arguments]) == 0
    text, report = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "attribution       prompts of 16 tokens with 1,600 active features, 1,600 of them traced" in text
    graphs = report["graphs"]
    alone, split = graphs["places"]
    assert (alone["chips"], split["chips"]) == (1, 16) and alone["coder"] == pytest.approx(
        16 * split["coder"], rel=0.01
    )
    for place in (alone, split):
        assert place["fits"] and place["total"] >= graphs["model"] + graphs["prompt"] + place["coder"]
        assert set(place["parts"]) == {"encode", "read rows"} and min(place["parts"].values()) > 0
    exact, narrow = graphs["float32"], graphs["bfloat16_3x"]
    assert set(exact) == {"true pass", "gather", "embeddings", "carry targets", "products"} == set(narrow)
    assert narrow["carry targets"] <= exact["carry targets"] and narrow["embeddings"] == exact["embeddings"]


@needs_libtpu
def test_a_step_that_does_not_fit_is_refused_with_advice(capsys):
    settings = "coder.features=1048576 batch=32 length=64 compute=bfloat16".split()
    arguments = ["tiny", "--topology", "v5e:2x2"]
    assert main(["plan", *arguments, *(part for setting in settings for part in ("--set", setting))]) == 0
    output = capsys.readouterr().out
    assert "does not fit: needs" in output and "to make it fit" in output


def compile_case(layers: int, features: int, data: int, shards: int) -> dict:
    from collectives import check_step
    from jax.experimental.topologies import get_topology_desc

    from jclt.coders import CoderConfig
    from jclt.mesh import make_mesh
    from jclt.models import known_config
    from jclt.training.coder.abstract import lower_step

    model = replace(known_config("gpt2"), layers=layers)
    coder = CoderConfig(features=features).fit_to_model(model, "gpt2")
    config = TrainConfig(coder, batch=32, length=256, micro_batches=2, compute="bfloat16")
    mesh = make_mesh(data, shards, get_topology_desc(TOPOLOGY, platform="tpu").devices)
    compiled = lower_step(config, model, mesh).compile()
    used = compiled.memory_analysis()
    memory = {
        "arguments": used.argument_size_in_bytes,
        "new outputs": used.output_size_in_bytes - used.alias_size_in_bytes,
        "temporary": used.temp_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
    }
    collectives = check_step(compiled.as_text(), config, data, shards)
    return {
        "memory": {name: round(size / 2**30, 3) for name, size in memory.items()},
        "collectives": [str(collective) for collective in collectives],
    }


def compile_kernels(topology: str) -> dict:
    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import NamedSharding, PartitionSpec

    from jclt.kernels.row_lists import GroupedRows
    from jclt.kernels.row_sums import dot_rows, sum_rows
    from jclt.mesh import make_mesh

    jax.set_mesh(mesh := make_mesh(devices=get_topology_desc(topology, platform="tpu").devices[:1]))
    tokens, features, width, pairs = 2048, 384, 2304, 4096

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def sums_and_products(lists: list, values: Any, rows: Any) -> Any:
        lists = [GroupedRows(*arrays, first) for first, arrays in enumerate(lists)]
        return sum_rows(lists, [values] * len(lists), len(lists)), dot_rows(lists, rows)

    def compile_layers(layers: int) -> dict:
        lists = [
            (array(jnp.int32, tokens + 1), array(jnp.int32, pairs), array(jnp.float32, features, layers - i, width))
            for i in range(layers)
        ]
        inputs = lists, array(jnp.float32, pairs), array(jnp.bfloat16, tokens, layers, width)
        text = jax.jit(sums_and_products).lower(*inputs).compile().as_text()
        calls = re.findall(r"%(\w+?)[.\d]* = .*custom-call.*tpu_custom_call", text)
        return {"kernels": sorted(set(calls), reverse=True), "on SparseCores": "sparsecore" in text}

    return {"26 layers": compile_layers(26), "one layer": compile_layers(1)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `collectives`
    case = sys.argv[1]
    print(json.dumps(compile_case(*CASES[case]) if case in CASES else compile_kernels(case)))
