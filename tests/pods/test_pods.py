"""Planning for pods without the TPU compiler: schedules are read correctly, and links are timed correctly."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from jclt.cli.main import main
from jclt.coders import CoderConfig
from jclt.config import load_settings
from jclt.errors import UserError
from jclt.models import abstract_params
from jclt.pods import load_pod, plan_run
from jclt.pods.chips import CHIPS, GIB, Network, count_chips, find_chip
from jclt.pods.collectives import count_hbm_bytes, find_collectives, parse_first_group
from jclt.pods.flags import FLAGS, VARIABLE, set_flags
from jclt.pods.hlo import Program, find_stage
from jclt.pods.report import advise, format_graphs, format_plan
from jclt.pods.schedule import simulate_schedule
from jclt.pods.slices import find_model_config
from jclt.pods.variants import list_variants
from jclt.pods.worker import Job, Worker, run_jobs
from jclt.training.config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[2] / "tpu_configs").glob("*_v[0-9]*.py"))
PLANS = json.loads((Path(__file__).parents[2] / "tpu_configs" / "plans.json").read_text())

# A loop of three rounds. In each an all-reduce begins, a product of 3,000 cycles runs beside it, it ends; then an
# all-gather runs alone. After the loop a fusion reads a slice of an array in HBM and writes to VMEM.
TEXT = (Path(__file__).parents[1] / "golden" / "schedule.hlo").read_text()
NETWORK = Network(CHIPS["v5e"], (2, 2), ((0, 0), (1, 0), (0, 1), (1, 1)), (0,) * 4, (0,) * 4)


def test_a_schedule_is_cycles_and_what_of_its_traffic_nothing_hides():
    line = simulate_schedule(Program(TEXT), NETWORK)
    clock, link = CHIPS["v5e"].clock, 4.5e10  # an axis of two chips has no ring: half of 9e10
    assert line.stages["encode backward"] == pytest.approx(3 * 3000 / clock)
    assert line.stages["update"] == pytest.approx(500 / clock)
    assert line.work == pytest.approx((3 * 3000 + 500) / clock)
    summed = 2 * (2**20 * 3 / 4 / (2 * link) + 4 * 1e-6)  # two passes over two axes, four hops
    gathered = 2**20 / 2 / link + 1e-6  # one axis, two chips: one ring of them
    by_kind = {traffic.name.split()[0]: traffic for traffic in line.traffic}
    assert by_kind["all-reduce"].seconds == pytest.approx(3 * summed) and by_kind["all-reduce"].times == 3
    assert by_kind["all-gather"].seconds == pytest.approx(3 * gathered)
    assert by_kind["all-gather"].exposed == pytest.approx(3 * gathered)
    assert by_kind["all-reduce"].exposed == pytest.approx(3 * (summed - 3000 / clock))
    assert line.seconds == pytest.approx(line.work + line.exposed)
    assert by_kind["all-gather"].stage == "reshard" and by_kind["all-reduce"].stage == "decode"


@pytest.mark.parametrize(
    "branches", ["branch_computations={%skip, %one, %two}", "true_computation=%two, false_computation=%skip"]
)
def test_of_a_conditional_the_chosen_branch_runs(branches):
    lines = []
    for name, cycles in (("skip", 1), ("one", 10), ("two", 100)):
        add = f'  %{name}.1 = f32[8]{{0}} fusion(%x), calls=%f, "estimated_cycles":"{cycles}"'
        lines += [f"%{name} (x: f32[8]) -> f32[8] {{", add, "}"]
    choose = f"  %c = f32[8]{{0}} conditional(%p, %x), {branches}, metadata={{}}"
    text = "\n".join([*lines, "ENTRY %main (x: f32[8]) -> f32[8] {", choose, "}"])

    def count(**branch: int) -> int:
        return sum(step.instruction.cycles for step in Program(text, **branch).list_steps())

    assert count() == count(branch=-1) == 100 and count(branch=0) == 1
    assert count(branch=1) == (10 if "%one" in branches else 100)


def test_bytes_moved_count_slices_and_what_lies_in_hbm():
    program = Program(TEXT)
    moved = {step.instruction.name: program.count_moved_bytes(step.instruction) for step in program.list_steps()}
    assert moved["fusion.9"] == 128 * 4  # a row of 100, read; it is written to VMEM
    assert moved["fusion.7"] == 2 * 64 * 64 + 4  # what it writes, and the number it is given
    assert count_hbm_bytes("(f32[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)})") == 2048


KERNELS = (Path(__file__).parents[1] / "golden" / "kernels.hlo").read_text()


def test_kernels_take_what_moving_their_bytes_takes_and_sparse_cores_work_beside_the_rest():
    """The last of two branches counts: `lax.cond` takes it if its condition holds."""
    line, chip = simulate_schedule(Program(KERNELS), NETWORK), CHIPS["v5e"]
    beside = 600_000 / chip.clock
    gathers, products = 8.2e8 / chip.bandwidth, 4.1e8 / chip.bandwidth
    assert line.stages == pytest.approx({"update": beside, "decode": gathers - beside, "encode": products})
    assert line.kernels == pytest.approx(gathers - beside + products)
    assert line.seconds == pytest.approx(gathers + products) and line.moved >= 8.2e8 + 4.1e8


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("mesh['a'=2,'b'=3] {'b'}", [0, 1, 2]),
        ("mesh['a'=2,'b'=3] {'a'}", [0, 3]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
        ("{{0,2},{1,3}}", [0, 2]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
    ],
)
def test_groups_are_read_from_all_their_forms(written, group):
    assert parse_first_group(written) == group


def test_rings_slices_and_hosts_decide_what_links_carry():
    pod = Network(CHIPS["v5e"], (16, 16), tuple((i % 16, i // 16) for i in range(256)), (0,) * 256, (0,) * 256)
    size = 10**9
    both = 2 * (size * 255 / 256 / (2 * 9e10) + 16e-6)
    assert pod.estimate_seconds("all-reduce", size, range(256)) == pytest.approx(both)
    assert pod.estimate_seconds("all-gather", size, range(256), one_ring=True) == pytest.approx(
        size * 255 / 256 / 9e10 + 128e-6
    )
    assert pod.estimate_seconds("all-reduce", size, range(16)) == pytest.approx(2 * (size * 15 / 16 / 9e10 + 8e-6))
    assert pod.estimate_seconds("all-reduce", size, [3]) == 0
    two = Network(CHIPS["v5e"], (1, 4), tuple((0, i % 4) for i in range(8)), (0,) * 4 + (1,) * 4, (0,) * 4 + (1,) * 4)
    # Four chips of a host share its network; each sends half of what two slices add up.
    assert two.estimate_seconds("all-reduce", size, [0, 4]) == pytest.approx(2 * size / 2 / (2.5e10 / 4))


def test_collectives_that_run_beside_work_count_once():
    collectives = find_collectives(TEXT)
    assert [(collective.kind, collective.size, collective.one_ring) for collective in collectives] == [
        ("all-reduce", 2**20, False),
        ("all-gather", 2**20, True),
    ]
    assert find_stage("jit(train_step)/while/body/closed_call/transpose(jvp(decode))/from_3/mul") == "decode backward"


def test_flags_are_set_once_and_the_users_own_come_last(monkeypatch):
    monkeypatch.setenv(VARIABLE, "--mine=1")
    set_flags()
    set_flags()
    import os

    flags = os.environ[VARIABLE].split()
    assert flags == [*(f"--{flag.name}={flag.value}" for flag in FLAGS), "--mine=1"]
    assert all(flag.reason for flag in FLAGS)


def as_json(config: TrainConfig) -> dict:
    return json.loads(json.dumps(asdict(config)))


def with_defaults(settings: dict) -> dict:
    """Adds the settings that are newer, with their defaults."""
    defaults = as_json(TrainConfig(CoderConfig()))
    return defaults | settings | {"coder": defaults["coder"] | settings["coder"]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_planned_and_fits(path):
    config, pod = load_settings(str(path), TrainConfig, {}), load_pod(str(path), None, None)
    model = find_model_config(pod, config)
    chips = count_chips(pod.topology) * pod.slices
    assert config.batch % chips == 0 and config.length % config.micro_batches == 0
    assert config.coder.features % (chips // config.data_shards) == 0
    assert abstract_params(model)
    plan = PLANS[path.stem]
    assert with_defaults(plan["settings"]) == as_json(config), "not planned since its file changed"
    assert plan["fits"] and plan["memory"]["headroom"] >= 0.08 and plan["chips"] == chips


def test_dense_decoding_is_planned_at_60_percent_of_peak():
    large = {name: plan for name, plan in PLANS.items() if name.endswith(("v5e_256", "v5p_256"))}
    assert len(large) >= 5 and {name for name, plan in large.items() if plan["utilisation"] < 0.6} == set()


def test_sums_travel_beside_products_where_a_whole_torus_adds_them_up():
    for name in ("gemma_2_9b_5m_v5p_256", "method_paper_10m_v5p_256"):
        sums = [
            entry for entry in PLANS[name]["traffic"] if (entry["stage"], entry["kind"]) == ("decode", "all-reduce")
        ]
        assert sum(entry["exposed"] for entry in sums) < 0.3 * sum(entry["seconds"] for entry in sums), sums


def test_a_plan_says_what_to_change_where_it_does_not_fit():
    path = next(path for path in CONFIGS if path.stem.startswith("gpt2"))
    config, report = load_settings(str(path), TrainConfig, {}), PLANS[path.stem]
    text = format_plan(config, report)
    assert "not a measurement" in text and f"{report['utilisation']:.0%} of peak" in text
    refused = report | {
        "memory": {"limit": 15.75 * GIB, "parameters": GIB, "optimizer": GIB, "model": 0, "other": 0},
        "refused": "needs 20.00G, expected at most 15.75G",
    }
    advice = format_plan(config, refused)
    assert "does not fit: needs 20.00G" in advice and "micro_batches=" in advice
    assert any("remat" in line for line in advise(config, refused))


def test_a_sweep_goes_over_meshes_micro_batches_and_rematerialisation():
    path = next(path for path in CONFIGS if path.stem.startswith("gpt2"))
    config, pod = load_settings(str(path), TrainConfig, {}), load_pod(str(path), None, None)
    variants = list(list_variants(config, pod))
    assert config in variants and len({asdict(variant).__str__() for variant in variants}) == len(variants)
    assert {variant.data_shards for variant in variants} == {1, 2, 4} and {variant.remat for variant in variants} == {
        False,
        True,
    }


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_tpu_compiler_one_line_says_how_to_get_it(capsys):
    assert main(["plan", "tiny", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'jclt[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "named"), [("v5e-8", "topology 'v5e-8'"), ("v9:2x2", "v9"), (None, "defines no `pod`")]
)
def test_bad_topologies_are_named(topology, named, capsys):
    assert main(["plan", "tiny", *(["--topology", topology] if topology else [])]) == 2
    assert named in capsys.readouterr().err


def test_chips_are_what_the_compiler_says():
    assert find_chip("v5p:4x4x8").memory == 95.74 * GIB
    with pytest.raises(UserError, match="expected CHIP:AxB"):
        find_chip("v5e")


@pytest.mark.parametrize("where", ["vm", "gke"])
def test_launching_shows_its_commands_first(where):
    path = next(path for path in CONFIGS if "2x_v5e" in path.stem)
    script = path.parent / "launch.py"
    arguments = [where, str(path), "--bucket", "gs://mine", "--zone", "somewhere", "--spot", "--dry-run"]
    process = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert re.search(
        rf"jclt train {path.name} --out gs://mine/runs/{path.stem} --set data=gs://mine/tokens", process.stdout
    )
    if where == "vm":
        assert "--accelerator-type v5litepod-256" in process.stdout and "--node-count 2" in process.stdout
    else:
        start = process.stdout.index("{")
        manifest, _ = json.JSONDecoder().raw_decode(process.stdout[start:])
        (job,) = manifest["spec"]["replicatedJobs"]
        assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 64
    assert jax.process_count() == 1


def test_parts_of_a_plan_are_said_as_they_are_ready(monkeypatch):
    path = next(path for path in CONFIGS if path.stem.startswith("gpt2"))
    config, plan, messages = load_settings(str(path), TrainConfig, {}), PLANS[path.stem], []
    step = {name: value for name, value in plan.items() if name not in ("sparse", "graphs", "calibration")}
    place = {"chips": 1, "coder": 1 * GIB, "total": 3 * GIB, "fits": True, "parts": {"encode": 0.1}}
    other = {"chips": 8, "coder": 1 * GIB, "total": 5 * GIB, "fits": False, "parts": {}}
    graphs = {"prompt_length": 64, "model": 1 * GIB, "limit": 4 * GIB, "features": 7500, "rows": 7500, "cut": 6}
    graphs |= {"chips": 8, "prompt": 1 * GIB, "fits": True, "places": [place, other]}
    graphs |= {"float32": {"true pass": 0.1, "products": 0.3}, "bfloat16_3x": {"true pass": 0.1, "products": 0.1}}
    sparse = step | {"active": 100.0, "room": 3.0, "kernel_seconds": 0.0, "seconds": step["seconds"] / 2}
    reports = {"step": step, "sparse": sparse, "graphs": graphs, "calibration": plan["calibration"]}

    def run_jobs(jobs):
        for number, name in enumerate(jobs):
            assert len(messages) == number
            yield name, reports[name]

    monkeypatch.setattr("jclt.pods.plan.run_jobs", run_jobs)
    text, report = plan_run(config, load_pod(str(path), None, None), 64, 100.0, messages.append)
    assert text == "\n\n".join(messages) and len(messages) == 4 and report["sparse"] == sparse
    assert messages[1].startswith("sparse path") and "2.00 times as fast as the dense path" in messages[1]
    assert messages[2].startswith("attribution       prompts of 64 tokens with 7,500 active features")
    assert "float32      0.4 s a graph: true pass 25%, products 75%" in messages[2]
    assert "coder on one chip: 3.00 of 4.00 GiB a chip, with 1.00 GiB of coder; beside it encode 0.1 s" in messages[2]
    assert "bfloat16_3x  0.3 s a graph, 12,000 graphs a chip-hour, 26.7 a second on the slice" in messages[2]
    assert "coder split over 8 chips: does not fit: 5.00 of" in messages[2] and "a large product" in messages[3]
    assert "graphs of a model split over chips are not planned" in format_graphs(
        config, {"graphs": graphs | {"fits": False}}
    )


def test_workers_compile_two_at_a_time_and_end_with_the_one_who_asked(monkeypatch):
    started: list = []

    def start(job):
        code = f"import time; time.sleep({job.arguments[0]}); print('{{\"report\": 1}}')"
        output = tempfile.TemporaryFile()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output)
        assert sum(worker.process.poll() is None for worker in started) < 2
        started.append(Worker(process, output, tempfile.TemporaryFile()))
        return started[-1]

    monkeypatch.setattr("jclt.pods.worker.find_spec", lambda name: True)
    monkeypatch.setattr("jclt.pods.worker.start_worker", start)
    jobs = {name: Job(name, "plan_step", (seconds,)) for name, seconds in {"a": 0.2, "b": 0, "c": 60, "d": 60}.items()}
    answers = run_jobs(jobs)
    assert [next(answers), next(answers)] == [("a", 1), ("b", 1)]
    answers.close()
    assert all(worker.process.returncode is not None for worker in started)
