"""Names of tasks and domains that stand for the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from sts_fast.errors import InputError, listed
from sts_fast.outcomes.evaluation import Task

# Words before a domain's name that name its benchmark.
BENCHMARK = re.compile(r"^(leaderboard |lukaemon )?(mmlu pro|mmlu|hendryckstest) ")
OTHER_NAMES = {"hendryckstest": "mmlu"}


def match_domains(
    wanted: Sequence[str],
    known: Iterable[str],
    *,
    own_names: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
    said: Sequence[str] = (),
) -> dict[str, str]:
    """The outcome of each domain of the forecast: wanted name -> known name, without domains that have none.

    Names match if they are the same in lower case, with everything except letters and digits read as a space. Where no
    name matches, the benchmark's name in front is dropped (mmlu_pro_law, hendrycksTest-law and law); names of two
    benchmarks do not match.

    own_names: known name -> another name of the same
    given:     wanted name -> name of its outcome, which needs not match
    said:      what was said when the outcomes were read, such as which were left out

    Raises InputError where two outcomes fit one domain, two domains one outcome, or a given name is not there.
    """
    known_forms = {name: (name, (own_names or {}).get(name, name)) for name in known}
    given = given or {}
    if unknown := [name for name in given if name not in wanted]:
        raise InputError(f"the forecast has no domain '{unknown[0]}', only {listed(wanted)}: match one of these")
    matches: dict[str, str] = {}
    for name in wanted:
        sought = given.get(name, name)
        fitting = [other for other, of_other in known_forms.items() if sought in of_other]
        for is_same in (_is_same, _is_same_domain):
            fitting = fitting or [
                other for other, of_other in known_forms.items() if any(is_same(sought, text) for text in of_other)
            ]
        if name in given and not fitting:
            raise InputError(
                f"there is no outcome '{sought}' to match '{name}' with, only {'; '.join([listed(known_forms), *said])}"
            )
        if len(fitting) > 1:
            raise InputError(
                f"the domain '{name}' could be {' or '.join(fitting)}: choose with --match '{name}={fitting[0]}'"
            )
        if fitting:
            taken = next((other for other, outcome in matches.items() if outcome == fitting[0]), None)
            if taken is not None:
                raise InputError(f"the domains '{taken}' and '{name}' both match outcome '{fitting[0]}': rename one")
            matches[name] = fitting[0]
    return matches


def find_task(name: str, tasks: Mapping[str, Task], own_names: Mapping[str, str]) -> str | None:
    """The task of a name, in any spelling; None where none or several have it."""
    fitting = [other for other in tasks if name == other or name == own_names.get(other)]
    for is_same in (_is_same, _is_same_domain):
        fitting = fitting or [
            other for other in tasks if is_same(name, other) or is_same(name, own_names.get(other, other))
        ]
    return fitting[0] if len(fitting) == 1 else None


def forms_of(name: str, *tasks: Task) -> set[str]:
    """The names that a task goes by."""
    return {name, *(task.own_name for task in tasks if task.own_name is not None)}


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def _is_same(first: str, second: str) -> bool:
    return _plain(first) == _plain(second)


def _is_same_domain(first: str, second: str) -> bool:
    """True where two names are the same without the benchmark in front, unless they name two benchmarks."""
    (one, of_one), (other, of_other) = (_benchmark_and_domain(name) for name in (first, second))
    return of_one == of_other and (one == other or None in (one, other))


def _benchmark_and_domain(name: str) -> tuple[str | None, str]:
    plain = _plain(name)
    found = BENCHMARK.match(plain)
    if found is None:
        return None, plain
    return OTHER_NAMES.get(found[2], found[2]), plain[found.end() :]
