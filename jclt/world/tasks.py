"""All tasks of the small world, in a fixed order."""

from jclt.world.example import Task
from jclt.world.facts import ANTONYM, ATHLETE, TWO_HOP
from jclt.world.numbers import ADDITION, GREATER_THAN, SUCCESSOR
from jclt.world.syntax import ACRONYM, AGREEMENT, CLOSING, INDUCTION, IOI

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ACRONYM,
        ATHLETE,
        ADDITION,
        TWO_HOP,
        AGREEMENT,
        IOI,
        GREATER_THAN,
        ANTONYM,
        SUCCESSOR,
        CLOSING,
        INDUCTION,
    )
}
