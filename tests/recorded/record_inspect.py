"""Records logs of inspect, as .eval, of a made-up model, for the tests of their reader.

inspect is not installed for the tests. Run this where it is: `pip install inspect-ai; python record_inspect.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiktoken
from inspect_ai import Task, eval, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, get_model
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate


class Words:
    """Stands for the tokenizer that inspect would download to count tokens."""

    def encode(self, text: str, **_: object) -> list[str]:
        return text.split()


tiktoken.get_encoding = tiktoken.encoding_for_model = lambda _: Words()

# By question, whether the model is right in each of two epochs; inspect goes through a whole epoch at a time.
RIGHT = {
    "before": [(1, 1), (0, 0), (1, 0), (0, 0), (0, 1)],
    "after": [(1, 1), (1, 1), (1, 1), (0, 0), (1, 0)],
}


@task
def law(fewshot: int = 0) -> Task:
    questions = [Sample(input=f"Is case {i} good law?", target="yes", id=i) for i in range(5)]
    return Task(dataset=questions, solver=[generate()], scorer=[match(), includes()])


folder = Path(sys.argv[1])
for when, right in RIGHT.items():
    answers = ["yes" if of_question[epoch] else "no" for epoch in (0, 1) for of_question in right]
    outputs = [ModelOutput.from_content("mockllm/model", answer) for answer in answers]
    eval(
        law(fewshot=0 if when == "before" else 2),
        model=get_model("mockllm/model", custom_outputs=outputs, memoize=False),
        epochs=2, max_samples=1, log_dir=str(folder / when), log_format="eval", display="none",
    )  # fmt: skip
    (log,) = (folder / when).glob("*.eval")
    log.rename(folder / f"{when}.eval")
    (folder / when).rmdir()
