"""From a command line to a search, and from what it asks for to jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError, nearest
from experiments.sweeps import Job, Sweep
from experiments.training.samplers import Ask, Halving, Search, Sobol, Tpe, steps_of
from experiments.training.tuning import SAMPLERS, Tuning
from experiments.trials import trials_of

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from experiments.training.freeze import Composer

SEARCHES: dict[str, type[Search]] = {"sobol": Sobol, "tpe": Tpe, "halving": Halving, "tuning": Tuning}
BY = ("final", "best")
MOST = 10_000
WHOLE_NUMBERS = {"n_trials": 1, "seed": 0, "startup_trials": 1, "rungs": 1, "factor": 2}
"""Setting of ``hydra.sweeper`` -> least value."""


def search_of(composer: Composer) -> Search | None:
    """The search that a command line asks for; None for every combination.

    Raises:
        UserError: it cannot be searched so.
    """
    name = composer.choices["hydra/sweeper"]
    if name not in SEARCHES:
        return None
    node = composer.sweeper
    _check(node)
    overrides = composer.arguments()
    swept = {one.get_key_element(): one for one in overrides if one.is_sweep_override()}
    fixed = [one.input_line for one in overrides if not one.is_sweep_override()]
    given = {key: node[key] for key in ("n_trials", "seed", "by", "metric")}
    if name == "tuning":
        return _tuning(composer, node, list(swept), given | {"fixed": fixed})
    return _sampler(composer, name, node, swept, given | {"fixed": fixed})


def _sampler(
    composer: Composer,
    name: str,
    node: Mapping[str, Any],
    swept: dict[str, Override],
    given: dict[str, Any],
) -> Search:
    from experiments.training.space import dimension

    dimensions = [dimension(one) for key, one in swept.items() if key != "seed"]
    if not dimensions:
        raise UserError(
            f"hydra/sweeper={name} chooses values, and no setting has several: give it some, as in "
            "'optimizer.lr=tag(log,interval(1e-3,1))' or clipping.threshold=0.3,1,3"
        )
    first = [f"{one.key}={one.at(0.0)}" for one in dimensions]
    config = composer.config([*given["fixed"], *first])
    seeds = dimension(swept["seed"]).choices if "seed" in swept else [str(config["seed"])]
    if not seeds:
        raise UserError("seed: every trial is run at all seeds, which are a list: seed=0,1,2")
    given |= {
        "fixed": [line for line in given["fixed"] if not line.startswith("seed=")],
        "seeds": seeds,
        "dimensions": dimensions,
    }
    if name == "tpe":
        if infinite := [one.key for one in dimensions if one.or_inf]:
            raise UserError(
                f"hydra/sweeper=tpe cannot mix an interval with infinity, as {infinite[0]} does: "
                "give choices, or another sampler"
            )
        return Tpe(**given, startup_trials=node["startup_trials"])
    if name == "halving":
        steps = steps_of(node["rungs"], node["factor"], config["max_steps"], config["eval_every"])
        return Halving(**given, factor=node["factor"], steps=steps)
    return Sobol(**given)


def _tuning(composer: Composer, node: Mapping[str, Any], swept: list[str], given: dict[str, Any]) -> Tuning:
    both = [line for line in given["fixed"] if line.split("=")[0] in ("seed", "clipping")]
    if taken := swept + both:
        raise UserError(
            f"{taken[0]}: hydra/sweeper=tuning chooses clippings, seeds and values itself, by "
            "hydra.sweeper.methods, select_seeds, report_seeds and space"
        )
    if node["sampler"] not in SAMPLERS:
        raise UserError(f"hydra.sweeper.sampler must be {' or '.join(SAMPLERS)}, got {node['sampler']!r}")
    for key in ("methods", "select_seeds", "report_seeds"):
        if not isinstance(node[key], list) or not node[key] or len(set(node[key])) < len(node[key]):
            raise UserError(f"hydra.sweeper.{key} must be a list, each once, got {node[key]!r}")
    for key in ("select_seeds", "report_seeds"):
        if not all(isinstance(seed, int) for seed in node[key]):
            raise UserError(f"hydra.sweeper.{key} must be whole numbers, got {node[key]!r}")
    space = composer.space(node["space"])
    methods = {}
    for method in node["methods"]:
        config = composer.config([*given["fixed"], f"clipping={method}"])
        methods[method] = [one.key for one in space if _has(config, one.key)]
    _check_known(composer, given["fixed"], {one.key for one in space}.difference(*methods.values()))
    seeds = {key: list(map(str, node[key])) for key in ("select_seeds", "report_seeds")}
    tuning = Tuning(**given, sampler=node["sampler"], space=space, methods=methods, **seeds)
    tuning.check()
    return tuning


def _check_known(composer: Composer, fixed: list[str], keys: set[str]) -> None:
    """Raise ``UserError`` for a key that no method has at all, of those that none of the chosen has."""
    for method in composer.options("clipping") if keys else ():
        config = composer.config([*fixed, f"clipping={method}"])
        keys = {key for key in keys if not _has(config, key)}
    if keys:
        raise UserError(f"hydra.sweeper.space: no method has a setting {', '.join(sorted(keys))}")


def _has(config: dict[str, Any], path: str) -> bool:
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True


def _check(node: Mapping[str, Any]) -> None:
    for key, least in WHOLE_NUMBERS.items():
        value = node.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            many = ", the same for every method" if "methods" in node else ""
            raise UserError(
                f"hydra.sweeper.{key} must be a whole number from {least} to {MOST}{many}, got {value!r}"
            )
    if node["by"] not in BY:
        raise UserError(
            f"hydra.sweeper.by must be {' or '.join(BY)}, got {node['by']!r}.{nearest(str(node['by']), BY)}"
        )
    if not isinstance(node["metric"], str | None):
        raise UserError(f"hydra.sweeper.metric must be the name of a metric, or null, got {node['metric']!r}")


def load(sweep: Sweep) -> Search | None:
    """The search of a sweep that was written; None if it is of every combination."""
    plain = sweep.facts().get("search")
    if plain is None:
        return None
    return SEARCHES[plain["name"]].load({key: value for key, value in plain.items() if key != "name"})


def dump(search: Search | None) -> dict[str, Any] | None:
    """Plain values of a search, for the sweep's folder."""
    if search is None:
        return None
    name = next(name for name, kind in SEARCHES.items() if type(search) is kind)
    return {"name": name, **search.dump()}


def more(sweep: Sweep, search: Search | None, workers: int) -> list[Ask]:
    """What a sweep of which all is done goes on with."""
    return [] if search is None else search.ask(trials_of(sweep), workers, sweep.path)


def freeze(composer: Composer, asked: list[Ask], first: int) -> list[Job]:
    """Make jobs of what is asked for.

    Args:
        composer: of the launch.
        asked: not empty.
        first: number of the first.
    """
    jobs = []
    for number, ask in enumerate(asked, start=first):
        job = composer.freeze(ask.overrides, number, ask.label)
        jobs.append(job._replace(trial=ask.trial, until=ask.until))
    return jobs


def proposing(
    search: Search | None, workers: int, composer: Callable[[Sweep], Composer]
) -> Callable[[Sweep], list[Job]]:
    """What a ``Driver`` asks for more jobs.

    Args:
        search: of its sweep.
        workers: jobs that run at the same time.
        composer: of the sweep, called when there are some to compose.
    """
    made: list[Composer] = []

    def propose(sweep: Sweep) -> list[Job]:
        asked = more(sweep, search, workers)
        if not asked:
            return []
        with _in(Path(sweep.facts()["cwd"])):
            if not made:
                made.append(composer(sweep))
            return freeze(made[0], asked, len(sweep.jobs()))

    return propose


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    """Work there, as paths are told from there; where it is gone, here."""
    with contextlib.chdir(folder) if folder.is_dir() else contextlib.nullcontext():
        yield
