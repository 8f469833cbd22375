"""Planning for TPU pods: the programs that a run will run, compiled ahead of time."""

from jclt.pods.plan import plan_prompts, plan_run, plan_step, plan_sweep
from jclt.pods.slices import Pod, load_pod

__all__ = ["Pod", "load_pod", "plan_prompts", "plan_run", "plan_step", "plan_sweep"]
