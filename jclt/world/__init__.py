"""The small world: tasks with known rules, answers, held-out splits and intermediates, and a model that knows them."""

from jclt.world.corpus import corpus, text
from jclt.world.example import Concept, Example, Pair, Split, Task
from jclt.world.tasks import TASKS
from jclt.world.tokenizer import build_tokenizer

__all__ = ["TASKS", "Concept", "Example", "Pair", "Split", "Task", "build_tokenizer", "corpus", "text"]
