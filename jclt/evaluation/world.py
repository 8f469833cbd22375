"""A coder on the tasks of the small world: how often the replacement model gives the same answer as the model.

Two answers agree when they are the same token or both right, since the model too may choose any of several right
answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jclt.coders import Coder
from jclt.evaluation.batches import check_finite, iterate_batches
from jclt.evaluation.replacement import check_replaceable, measure_mean_writes, predict_tokens
from jclt.models import Model
from jclt.models.model import on_mesh
from jclt.shapes import Float
from jclt.world.example import Example, Split
from jclt.world.measure import get_vocabulary, pad_prompts
from jclt.world.tasks import TASKS

PROMPTS_AT_ONCE = 64
LENGTH_MULTIPLE = 16
"""Prompts and their number are padded to multiples of these, so that a few programs serve all tasks."""


@dataclass(frozen=True)
class TaskAgreement:
    """Shares of `count` examples."""

    count: int
    agreement: float  # of the replacement model with the model
    ablated_agreement: float  # of the mean-ablated control with the model
    accuracy: float  # of the replacement model
    model_accuracy: float


@dataclass(frozen=True)
class WorldAgreement:
    tasks: dict[str, TaskAgreement]

    @property
    def overall(self) -> TaskAgreement:
        """Over all examples."""
        tasks, counts = list(self.tasks.values()), [task.count for task in self.tasks.values()]

        def mean(name: str) -> float:
            return float(np.average([getattr(task, name) for task in tasks], weights=counts))

        names = ("agreement", "ablated_agreement", "accuracy", "model_accuracy")
        return TaskAgreement(sum(counts), **{name: mean(name) for name in names})

    def weakest(self) -> str:
        """The task of least agreement."""
        return min(self.tasks, key=lambda name: self.tasks[name].agreement)

    def summary(self) -> dict[str, float]:
        overall, weakest = self.overall, self.tasks[self.weakest()]
        return {
            "agreement": overall.agreement,
            "mean_task_agreement": float(np.mean([task.agreement for task in self.tasks.values()])),
            "weakest_agreement": weakest.agreement,
            "ablated_agreement": overall.ablated_agreement,
            "accuracy": overall.accuracy,
            "model_accuracy": overall.model_accuracy,
            **{f"agreement_{name}": task.agreement for name, task in self.tasks.items()},
        }

    def table(self) -> str:
        lines = [f"{'task':14}{'agreement':>10}{'ablated':>10}{'right':>10}{'model':>10}  of"]
        for name, task in (self.tasks | {"all": self.overall}).items():
            shares = (task.agreement, task.ablated_agreement, task.accuracy, task.model_accuracy)
            lines.append(f"{name:14}" + "".join(f"{share:10.1%}" for share in shares) + f"  {task.count}")
        return "\n".join(lines)


def measure_world_agreement(
    model: Model, coder: Coder, count: int = 400, seed: int = 0, *, split: Split = "report"
) -> WorldAgreement:
    """On at most `count` held-out examples of each task. The control writes the means over the prompts of all tasks."""
    check_replaceable(coder.config)
    examples = {name: task.examples(split, count, seed) for name, task in TASKS.items()}
    means = measure_mean_prompt_writes(
        model, coder, [example.prompt for of_task in examples.values() for example in of_task]
    )
    return WorldAgreement(
        {name: measure_task_agreement(model, coder, means, of_task) for name, of_task in examples.items()}
    )


def measure_mean_prompt_writes(model: Model, coder: Coder, prompts: Sequence[str]) -> Float[np.ndarray, "L D"]:
    tokens, ends = pad_prompts(model, prompts)
    return measure_mean_writes(
        model, coder.config, tokens, mask=np.arange(tokens.shape[1])[None] <= ends[:, None], batch=PROMPTS_AT_ONCE
    )


def measure_task_agreement(
    model: Model, coder: Coder, means: Float[np.ndarray, "L D"], examples: Sequence[Example]
) -> TaskAgreement:
    vocabulary = get_vocabulary(model)
    answers, replaced, ablated = predict_last_tokens(model, coder, means, [e.prompt for e in examples])
    right = [{vocabulary[answer] for answer in e.answers} for e in examples]
    return TaskAgreement(
        count=len(examples),
        agreement=measure_agreement(answers, replaced, right),
        ablated_agreement=measure_agreement(answers, ablated, right),
        accuracy=measure_accuracy(replaced, right),
        model_accuracy=measure_accuracy(answers, right),
    )


def measure_agreement(answers: np.ndarray, others: np.ndarray, right: Sequence[set[int]]) -> float:
    return float(np.mean([a == b or {a, b} <= valid for a, b, valid in zip(answers, others, right, strict=True)]))


def measure_accuracy(answers: np.ndarray, right: Sequence[set[int]]) -> float:
    return float(np.mean([answer in valid for answer, valid in zip(answers, right, strict=True)]))


def predict_last_tokens(
    model: Model, coder: Coder, means: Float[np.ndarray, "L D"], prompts: Sequence[str]
) -> tuple[np.ndarray, ...]:
    """The most probable token `[N]` after each prompt: the model's, the replacement's, the control's."""
    tokens, ends = pad_prompts(model, prompts)
    tokens = np.pad(tokens, ((0, -len(tokens) % PROMPTS_AT_ONCE), (0, -tokens.shape[1] % LENGTH_MULTIPLE)))
    with on_mesh(model):
        predicted = [
            np.asarray(predict_tokens(model.config, model.params, coder, means, rows))
            for rows, _ in iterate_batches(model, tokens, None, PROMPTS_AT_ONCE)
        ]
    answers = np.concatenate(predicted, axis=1)[:, np.arange(len(ends)), ends]
    for model_answers, whose in zip(
        answers, (f"model {model.name}: its", "coder: its replacement model's", "the control's"), strict=True
    ):
        check_finite(model_answers >= 0, f"{whose} logits are")
    return tuple(answers)
