"""The study's training sets, its domains, and the texts that its SAEs are trained on.

`train/NAME.jsonl` has the rows of a training set. `domains/NAME.jsonl` has those of a domain: first DEMONSTRATIONS
rows that are only ever shown, then the rows that outcomes are measured on. `texts.jsonl` has the texts of the SAEs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from study.real import sources
from study.real.sources import Row, asked, continued, shuffled

N_TRAIN, N_DOMAIN, DEMONSTRATIONS = 240, 32, 5
LONGEST_DOMAIN, LONGEST_TRAIN = 190, 220  # tokens of question and answer
LONGER_TRAIN = {"math": 320, "thoughts": 320, "mmlu-pro cot": 400}  # sets that would have too few rows otherwise
LONGEST_TEXT, TEXT_TOKENS = 300, 1_250_000  # tokens of one text of the SAEs, and of all of them

# A training question shares no run of N_GRAM words with a domain's question, except runs that SHARED_BY_MANY
# questions of one set have in common: those are the wording of the task.
N_GRAM, SHARED_BY_MANY = 8, 3

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
FAMILIES = {  # of generators of reasoning-gym: each family is a training set
    "rg arithmetic": ("basic_arithmetic", "decimal_chain_sum", "fraction_simplification", "products"),
    "rg algebra": ("simple_equations", "simple_integration", "polynomial_multiplication", "polynomial_equations"),
    "rg logic": ("knights_knaves", "syllogism", "family_relationships", "self_reference"),
    "rg algorithms": ("word_sequence_reversal", "sentence_reordering", "number_filtering", "spell_backward"),
    "rg games": ("countdown", "puzzle24", "mini_sudoku", "maze"),
}
# Each is a domain: of the generators with short questions, those whose answers the base model finds likelier behind
# their own question than behind another (z >= 2 over 24 questions). simple_integration and polynomial_multiplication
# are short only without their guidelines, and were taken unseen.
GENERATORS = (
    "basic_arithmetic",
    "decimal_chain_sum",
    "fraction_simplification",
    "prime_factorization",
    "time_intervals",
    "simple_integration",
    "polynomial_multiplication",
    "knights_knaves",
    "word_sequence_reversal",
    "sentence_reordering",
    "word_sorting",
    "word_ladder",
    "number_filtering",
    "number_format",
    "countdown",
    "puzzle24",
)
# Of MMLU, each is a domain, answered with the right option's text: of 24 subjects, those where the base model finds it
# likeliest beside the other options' (z over 32 questions).
SUBJECTS = (
    "miscellaneous",
    "world religions",
    "high school psychology",
    "high school geography",
    "nutrition",
    "clinical knowledge",
)
SEED_OF_TRAIN, SEED_OF_DOMAIN, SEED_OF_TEXTS = 101, 202, 303
STORY = "Continue this story:"
TEXT = "Continue this text:"


def own_domains(train: str) -> set[str]:
    """Domains of the very kind that a training set teaches; no correlation counts them."""
    if train == "translation":
        return {f"translation {name}" for name in LANGUAGES.values()}
    if train == "mmlu":
        return {"mmlu letters"}
    return {train, *(f"rg {generator}" for generator in FAMILIES.get(train, ()))}


def candidate_domains() -> dict[str, list[Row]]:
    """Rows of every domain in their order, longest and shortest included."""
    domains: dict[str, list[Row]] = {}
    for name, rows in _pools().items():
        domains[name] = rows[0]
    domains["olympiad"] = shuffled(sources.olympiad(), "olympiad")
    domains["humaneval"] = shuffled(sources.humaneval(), "humaneval")
    domains["networkx code"] = shuffled(sources.functions("networkx"), "networkx")
    stories = shuffled(sources.stories(), "stories")[:200]
    abstracts = [row["text"] for row in _pools()["pubmedqa"][0]]
    texts = {
        "stories": stories,
        "abstracts": abstracts,
        "documentation": shuffled(sources.documentation("torch"), "documentation")[:200],
        "source": shuffled(sources.source_code("networkx"), "source"),
    }
    for name, lines in texts.items():
        domains[f"text {name}"] = continued(lines, TEXT, (30, 50))
    subjects = sources.mmlu()
    for subject in SUBJECTS:
        domains[f"mmlu {subject}"] = sources.answered_in_words(shuffled(subjects[subject], subject))
    domains["mmlu letters"] = shuffled([row for subject in SUBJECTS for row in subjects[subject]], "letters")
    for category, rows in sorted(sources.mmlu_pro().items()):
        domains[f"pro {category}"] = shuffled(rows, category)
    for generator in GENERATORS:
        domains[f"rg {generator}"] = sources.generated(generator, 4 * N_DOMAIN, SEED_OF_DOMAIN)
    return domains


def candidate_trains() -> dict[str, list[Row]]:
    """Rows of every training set in their order, before the rules on length and overlap."""
    trains = {name: rows[1] for name, rows in _pools().items() if not name.startswith("translation")}
    trains["translation"] = shuffled(
        [row for name, rows in _pools().items() if name.startswith("translation") for row in rows[1]], "translation"
    )
    trains["code"] = shuffled(sources.functions("sympy"), "sympy")
    trains["mmlu"] = shuffled(_auxiliary_subjects(), "auxiliary")
    trains["mmlu-pro cot"] = sources.chains_of_thought()
    for family, generators in FAMILIES.items():
        rows = [row for name in generators for row in sources.generated(name, N_TRAIN, SEED_OF_TRAIN)]
        trains[family] = shuffled(rows, family)
    return trains


def candidate_texts() -> dict[str, list[Row | str]]:
    """Kind -> texts or rows that the SAEs may be trained on."""
    pools = _pools()
    kinds: dict[str, list[Row | str]] = {
        name: [*rows[1]] for name, rows in pools.items() if name in ("gsm8k", "math", "pubmedqa", "coqa", "thoughts")
    }
    kinds["stories"] = [*shuffled(sources.stories(), "stories")[200:]]
    kinds["abstracts"] = [row["text"] for row in pools["pubmedqa"][1]]
    kinds["mmlu"] = [*shuffled(_auxiliary_subjects(), "auxiliary")]
    kinds["mmlu-pro"] = [*shuffled([row for rows in sources.mmlu_pro().values() for row in rows], "pro")]
    kinds["code"] = [*shuffled(sources.functions("sympy"), "sympy"), *sources.source_code("sympy")]
    kinds["documentation"] = [*shuffled(sources.documentation("torch"), "documentation")[200:]]
    kinds["generated"] = shuffled(
        [row for name in GENERATORS for row in sources.generated(name, 200, SEED_OF_TEXTS)], "generated"
    )
    return kinds


def _pools() -> dict[str, tuple[list[Row], list[Row]]]:
    """Name -> (rows of the domain, rows of the training set), for sets that serve as both."""

    def parted(name: str, rows: list[Any], n_domain: int) -> tuple[list[Row], list[Row]]:
        mixed = shuffled(rows, name)
        usable = [[row for row in part if row is not None] for part in (mixed[:n_domain], mixed[n_domain:])]
        return usable[0], usable[1]

    pools = {
        "gsm8k": (sources.gsm8k("test"), sources.gsm8k("train")),
        "math": parted("math", sources.math500(), 130),
        "thoughts": parted("math", sources.thoughts("math500"), 130),  # the same problems on the same side
        "pubmedqa": parted("pubmedqa", sources.pubmedqa(), 300),
        "coqa": parted("coqa", sources.coqa(), 130),
        "tinystories": parted("tinystories", continued(sources.stories(), STORY, (25, 60)), 200),
    }
    for code, language in LANGUAGES.items():
        pools[f"translation {language}"] = parted(language, sources.translation(code, language), 120)
    return pools


def _auxiliary_subjects() -> list[Row]:
    return [row for subject, rows in sources.mmlu().items() if subject not in SUBJECTS for row in rows]


# Rules ---------------------------------------------------------------------------------------------------------------


class Lengths:
    """Tokens of question and answer, as the model's tokenizer counts them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def of(self, row: Row) -> int:
        return self(asked(row)) + self(row["answer"])


def n_grams(text: str) -> set[tuple[str, ...]]:
    """Runs of N_GRAM words, or the whole of a shorter text; case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + N_GRAM]) for i in range(max(1, len(words) - N_GRAM + 1))}


def telling_n_grams(questions: Iterable[str]) -> set[tuple[str, ...]]:
    """The n-grams of a set's questions without those that are the wording of its task."""
    counts = Counter(gram for question in questions for gram in n_grams(question))
    return {gram for gram, count in counts.items() if count < SHARED_BY_MANY}


def usable(rows: Iterable[Row], longest: int, lengths: Lengths) -> Iterator[Row]:
    """Rows that have an answer and fit, each question once."""
    seen = set()
    for row in rows:
        question = asked(row)
        if question not in seen and row["answer"].strip() and lengths.of(row) <= longest:
            seen.add(question)
            yield row


def make_sets(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Writes all sets; returns their counts and digests, for `results/sets.json`."""
    lengths = Lengths(tokenizer)
    found: dict[str, Any] = {"domains": {}, "train": {}, "texts": {}}
    barred: set[tuple[str, ...]] = set()
    for name, rows in candidate_domains().items():
        taken = list(_first(usable(rows, LONGEST_DOMAIN, lengths), DEMONSTRATIONS + N_DOMAIN))
        barred |= telling_n_grams(asked(row) for row in taken)
        found["domains"][name] = _write(folder / "domains" / f"{name}.jsonl", taken, lengths)

    for name, rows in candidate_trains().items():
        telling = telling_n_grams(asked(row) for row in rows)
        fitting = list(usable(rows, LONGER_TRAIN.get(name, LONGEST_TRAIN), lengths))
        apart = [row for row in fitting if not n_grams(asked(row)) & telling & barred]
        about = _write(folder / "train" / f"{name}.jsonl", apart[:N_TRAIN], lengths)
        found["train"][name] = {**about, "left_out_for_overlap": len(fitting) - len(apart)}

    found["texts"] = _write_texts(folder / "texts.jsonl", barred, tokenizer, lengths)
    return found


def _write_texts(path: Path, barred: set[tuple[str, ...]], tokenizer: Any, lengths: Lengths) -> dict[str, Any]:
    """Takes from the kinds in turn, a text each, until there are enough tokens."""
    kinds, found, chosen = candidate_texts(), {}, []
    telling = {}
    for kind, texts in kinds.items():
        plain = [text if isinstance(text, str) else asked(text) for text in texts]
        telling[kind] = telling_n_grams(plain) & barred
        found[kind] = {"texts": 0, "tokens": 0, "left_out_for_overlap": 0}
    waiting = {kind: iter(texts) for kind, texts in kinds.items()}
    total = 0
    while waiting and total < TEXT_TOKENS:
        for kind in [*waiting]:
            text = next(waiting[kind], None)
            if text is None:
                del waiting[kind]
                continue
            if n_grams(text if isinstance(text, str) else asked(text)) & telling[kind]:
                found[kind]["left_out_for_overlap"] += 1
                continue
            rendered = text if isinstance(text, str) else _chat(tokenizer, text)
            n_tokens = min(lengths(rendered), LONGEST_TEXT)
            if n_tokens < 16:
                continue
            chosen.append({"kind": kind, "text": rendered})
            found[kind]["texts"] += 1
            found[kind]["tokens"] += n_tokens
            total += n_tokens
    _write_lines(path, shuffled(chosen, "texts"))
    return {"tokens": total, "kinds": found, "sha256": _sha256(path)}


def _chat(tokenizer: Any, row: Row) -> str:
    turns = [{"role": "user", "content": asked(row)}, {"role": "assistant", "content": row["answer"]}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _first(rows: Iterator[Row], n: int) -> Iterator[Row]:
    for _, row in zip(range(n), rows, strict=False):
        yield row


def _write(path: Path, rows: list[Row], lengths: Lengths) -> dict[str, Any]:
    kept = [{key: row[key] for key in ("question", "options", "answer") if key in row} for row in rows]
    _write_lines(path, kept)
    return {
        "rows": len(rows),
        "question_tokens": round(sum(lengths(asked(row)) for row in rows) / max(1, len(rows)), 1),
        "answer_tokens": round(sum(lengths(row["answer"]) for row in rows) / max(1, len(rows)), 1),
        "sha256": _sha256(path),
    }


def _write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
