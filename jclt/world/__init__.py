"""The small world: tasks with known rules, answers, held-out splits and intermediate concepts, and a trained model."""

from jclt.world.corpus import make_corpus, make_text
from jclt.world.example import Concept, Example, Pair, Split, Task
from jclt.world.tasks import TASKS
from jclt.world.tokenizer import build_tokenizer

__all__ = ["TASKS", "Concept", "Example", "Pair", "Split", "Task", "build_tokenizer", "make_corpus", "make_text"]
