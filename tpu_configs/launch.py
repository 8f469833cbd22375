"""Runs a configuration of this folder on the TPUs it is meant for; --dry-run shows every command and does nothing.

    python tpu_configs/launch.py vm  tpu_configs/gpt2_small_300k_v5e_8.py --bucket gs://MINE --zone us-west4-a --dry-run
    python tpu_configs/launch.py gke tpu_configs/gpt2_small_300k_v5e_8.py --bucket gs://MINE --dry-run

`vm` asks for the slice as a queued resource, installs this working tree on all its hosts and starts `jclt train` there,
again and again until it is done: a preempted slice is asked for anew, and the run goes on from its newest checkpoint.
`gke` writes a JobSet and applies it; the cluster needs a node pool of the slice's kind. Tokens (BUCKET/tokens, made by
`jclt tokenize`), checkpoints, metrics, the compile cache and profiles all lie in the bucket. It needs `gcloud` (and
`kubectl` for gke), logged in. What is installed is the last commit of this working tree.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jclt.pods import Pod, load_pod
from jclt.pods.chips import count_chips


class Kind(NamedTuple):
    """What a chip is called by those who rent it out."""

    accelerator: str  # the beginning of its accelerator types
    counts: int  # what their number counts for a chip: v5p counts cores
    runtime: str
    gke: str


KINDS = {
    "v5e": Kind("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Kind("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Kind("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
CHIPS_A_HOST = 4
RESTARTS = 100


def train_command(config: Path, bucket: str, profile: int) -> str:
    """What every host runs; they find each other by themselves."""
    name = config.stem
    traced = f" --profile {profile}" if profile else ""
    return (
        f"export JAX_COMPILATION_CACHE_DIR={bucket}/compiled; "
        f"jclt train {config.name} --out {bucket}/runs/{name} --set data={bucket}/tokens{traced}"
    )


def install_command(bucket: str) -> str:
    """From nothing to `jclt` in a virtual environment, in the folder of configurations. TPU VMs may bring an older
    Python than it needs; uv installs one."""
    fetch = f"import fsspec; fsspec.filesystem('gs').get('{bucket}/jclt.tar.gz', 'jclt.tar.gz')"
    return (
        "UV=$HOME/.local/bin/uv; test -x $UV || python3 -m pip install --quiet --user uv; "
        "test -d .venv || $UV venv --quiet --python 3.12 .venv; . .venv/bin/activate; "
        f'$UV pip install --quiet gcsfs && python -c "{fetch}" && tar xzf jclt.tar.gz && '
        "$UV pip install --quiet '.[tpu,gcs]' && cd tpu_configs"
    )


def accelerator_type(pod: Pod) -> str:
    kind = KINDS[pod.topology.partition(":")[0]]
    return f"{kind.accelerator}-{count_chips(pod.topology) * kind.counts}"


class Shell:
    def __init__(self, dry: bool):
        self.dry = dry

    def __call__(self, *command: str, check: bool = True) -> str:
        print("+", shlex.join(command), flush=True)
        if self.dry:
            return ""
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if check and process.returncode:
            sys.exit(f"launch: '{command[0]} {command[1]} ...' ended with status {process.returncode}")
        return process.stdout.strip()


def upload(run: Shell, bucket: str) -> None:
    run("git", "archive", "--format=tar.gz", "--output=jclt.tar.gz", "HEAD")
    run("gcloud", "storage", "cp", "jclt.tar.gz", f"{bucket}/jclt.tar.gz")


def on_vm(run: Shell, config: Path, pod: Pod, options: argparse.Namespace) -> None:
    name, kind = config.stem.replace("_", "-"), KINDS[pod.topology.partition(":")[0]]
    where = ["--zone", options.zone, *(["--project", options.project] if options.project else [])]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    node = ["--node-id", name] if pod.slices == 1 else ["--node-prefix", name, "--node-count", str(pod.slices)]
    nodes = [name] if pod.slices == 1 else [f"{name}-{i}" for i in range(pod.slices)]
    create = [*queued, "create", name, *node, "--accelerator-type", accelerator_type(pod)]
    create += ["--runtime-version", kind.runtime, *(["--spot"] if options.spot else []), *where]
    work = f"{install_command(options.bucket)} && {train_command(config, options.bucket, options.profile)}"
    upload(run, options.bucket)
    for _ in range(RESTARTS):
        run(*create, check=False)
        describe = [*queued, "describe", name, "--format", "value(state.state)", *where]
        while run(*describe) not in ("ACTIVE", "FAILED", "SUSPENDED", ""):
            time.sleep(30)
        ssh = [
            ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node_name, "--worker=all", *where, "--command", work]
            for node_name in nodes
        ]
        for command in ssh:
            print("+", shlex.join(command), flush=True)
        if run.dry:
            print(f"+ (started anew, up to {RESTARTS} times, until it ends well)")
            return
        if not any([process.wait() for process in [subprocess.Popen(command) for command in ssh]]):
            break
        if run(*describe, check=False) != "ACTIVE":  # preempted
            run(*queued, "delete", name, "--force", "--quiet", *where, check=False)
    else:
        sys.exit(f"launch: not done after {RESTARTS} starts")
    back = shlex.join([*queued, "delete", name, "--force", *where])
    print(f"done: {options.bucket}/runs/{config.stem}; the chips are given back by: {back}")


def manifest(config: Path, pod: Pod, options: argparse.Namespace) -> dict[str, Any]:
    """A JobSet: one job a slice, one pod a host; any failure starts all of them anew."""
    kind, shape = KINDS[pod.topology.partition(":")[0]], pod.topology.partition(":")[2]
    chips = count_chips(pod.topology)
    hosts = max(1, chips // CHIPS_A_HOST)
    container = {
        "name": "train",
        "image": options.image,
        "command": [
            "bash",
            "-c",
            f"{install_command(options.bucket)} && {train_command(config, options.bucket, options.profile)}",
        ],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": min(chips, CHIPS_A_HOST)}},
    }
    selector = {"cloud.google.com/gke-tpu-accelerator": kind.gke, "cloud.google.com/gke-tpu-topology": shape}
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 300,  # SIGTERM: a checkpoint is written
                "nodeSelector": selector,
                "containers": [container],
            }
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": config.stem.replace("_", "-"),
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS},
            "replicatedJobs": [{"name": "slice", "replicas": pod.slices, "template": {"spec": job}}],
        },
    }


def on_gke(run: Shell, config: Path, pod: Pod, options: argparse.Namespace) -> None:
    upload(run, options.bucket)
    text = json.dumps(manifest(config, pod, options), indent=2)  # JSON is YAML
    print(text)
    if not run.dry:
        Path("jobset.json").write_text(text)
    run("kubectl", "apply", "-f", "jobset.json")
    run("kubectl", "wait", "--for=condition=Completed", f"jobset/{config.stem.replace('_', '-')}", "--timeout=-1s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("vm", "gke"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--bucket", required=True, help="gs://...")
    parser.add_argument("--zone", help="of the TPU VMs (vm)")
    parser.add_argument("--project", help="if not gcloud's default (vm)")
    parser.add_argument("--spot", action="store_true", help="cheaper, and preempted at times")
    parser.add_argument("--image", default="python:3.12", help="with Python and pip (gke)")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="traces so many steps for XProf")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.where == "vm" and not options.zone:
        sys.exit("launch: vm needs --zone")
    pod = load_pod(str(options.config), None, None)
    {"vm": on_vm, "gke": on_gke}[options.where](Shell(options.dry_run), options.config, pod, options)


if __name__ == "__main__":
    main()
