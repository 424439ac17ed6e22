"""Every figure of conf/figure, drawn of made-up runs of the very configs that its sweeps compose."""

import functools
import itertools
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from omegaconf import OmegaConf

from experiments.analysis.figures.base import ended
from experiments.analysis.figures.plan import find_plans
from experiments.analysis.marks import styled
from experiments.analysis.publish import Made, Published, make, path_of, runs_of
from experiments.analysis.render import read_table
from experiments.runs import Run, digest
from experiments.training.presets import Presets, conf_dir, for_hydra

PLANS = {plan.name: plan for plan in find_plans(conf_dir() / "figure", [])}
METRICS = {
    "cola": ("mcc", True),
    "imagenet": ("accuracy", True),
    "voc": ("miou", True),
    "reddit": ("accuracy", True),
    "quadratic": ("loss", False),
    "regression": ("distance", False),
    "expectation": ("loss", False),
}
STEPS, EVERY = 60, 15
SEEDS = 2
REPORTED = [100, 101]


@functools.cache
def config_of(overrides: tuple[str, ...]) -> dict:
    """What ``clipbench run`` would run with these settings."""
    given = dict(override.split("=", 1) for override in overrides)
    folders = (conf_dir(), conf_dir().parent / "scripts" / "conf")
    (experiment,) = (
        path for folder in folders for path in folder.glob(f"experiment/{given['experiment']}.yaml")
    )
    with_own = "\n  - override /preset:" in experiment.read_text()
    Presets(given.get("preset", None if with_own else "mini"), given).register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("run", overrides=for_hydra(given), return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        config = OmegaConf.to_container(own, resolve=True)
    names = {name: choices[name] for name in ("task", "optimizer", "clipping", "scheduler", "experiment")}
    config["names"] = names | {"preset": Path(choices["preset"]).name}
    return config | {"device_type": "cpu", "world_size": 1, "fingerprint": None}


def runs_for(plan) -> list[tuple[tuple[str, ...], int]]:
    """Settings and seeds of some of the runs that the sweeps of a figure make."""
    pairs = []
    for sweep in plan.sweeps:
        if plan.tuned or "experiment=tune_" in sweep:
            pairs += trials(sweep, plan.tuned.get("seeds", [0, 1]))
        else:
            pairs += [(overrides, seed) for overrides in jobs(sweep) for seed in range(SEEDS)]
    return pairs


def trials(sweep: str, seeds: list[int]) -> list[tuple[tuple[str, ...], int]]:
    """Two settings of a few methods where they are chosen; one of them, a third and defaults elsewhere."""
    asked = dict(word.split("=", 1) for word in shlex.split(sweep))
    methods = asked.get("hydra.sweeper.methods", "[no_clip,norm,auto_clip]").strip("[]").split(",")
    fixed = [f"{key}={value}" for key, value in asked.items() if not key.startswith("hydra.")]
    where = {"optimizer.lr=0.011": [*seeds, *REPORTED], "optimizer.lr=0.012": seeds}
    where["optimizer.lr=0.013"] = REPORTED
    tried = [
        ((*fixed, f"clipping={method}", lr), seed)
        for method in methods
        for lr, of_lr in (where if method == "norm" else dict(list(where.items())[::2])).items()
        for seed in of_lr
    ]
    return tried + [((*fixed, f"clipping={method}"), seed) for method in methods for seed in REPORTED]


def jobs(sweep: str) -> list[tuple[str, ...]]:
    """Settings of some of the jobs of a sweep: of all tasks, and of a few values of what else differs."""
    values = []
    for override in OverridesParser.create().parse_overrides(shlex.split(sweep)):
        name = override.key_or_group
        texts = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        if name != "seed":
            few = None if name.startswith("task") else 3 if name == "clipping" else 2
            values.append([f"{name}={text}" for text in texts][:few])
    return list(itertools.product(*values))


def place(config: dict, seed: int) -> dict:
    names = {
        name: config["names"][name] for name in ("experiment", "task", "preset", "optimizer", "clipping")
    }
    return {**names, "digest": digest(config), "seed": seed}


def seeded(overrides: tuple[str, ...], seed: int) -> dict:
    config = config_of(overrides) | {"seed": seed, "max_steps": STEPS, "eval_every": EVERY}
    own = {"seed": seed} if "seed" in config["clipping"] else {}
    return config | {"clipping": config["clipping"] | own}


def own_runs(plan) -> set[str]:
    """Paths of the runs that the sweeps of a figure make."""
    made = [
        Run.locate("", **place(seeded(overrides, seed), seed))
        for overrides, seed in runs_for(plan)
        if (not plan.tuned or (seed in REPORTED and "optimizer.lr=0.011" in overrides))
        and ("optimizer.lr" not in plan.runs or not any("optimizer.lr=0.01" in word for word in overrides))
    ]
    return {path_of(run) for run in made}


def make_run(results: Path, overrides: tuple[str, ...], seed: int) -> None:
    """A run with curves of all that tasks record; a run of ``no_clip`` diverges."""
    config = seeded(overrides, seed)
    names = config["names"]
    metric, higher_is_better = METRICS[names["task"]]
    run = Run.locate(results, **place(config, seed))
    if run.status:
        return
    diverges = seed in (1, REPORTED[-1]) and names["clipping"] == "no_clip"
    run.start(config)
    rng = np.random.default_rng([seed, *map(ord, run.names["digest"])])
    records, last = [], STEPS // 2 if diverges else STEPS
    for step in range(1, last + 1):
        norm = float(rng.lognormal())
        record = {"step": step, "epoch": 10 * step / STEPS, "train/loss": 2 / step + 0.1 * norm, "lr": 0.1}
        records.append(
            record | {"grad_norm": norm, "threshold": 1.0, "clip_coef": 1.0, "clipped": float(norm > 1)}
        )
        if step % EVERY == 0:
            value = step / STEPS + 0.1 * rng.random() + (config["optimizer"]["lr"] == 0.011)
            every = dict.fromkeys(("val/accuracy", "train/accuracy"), value) | {"val/loss": 1 / value}
            both = {
                f"{split}/{metric}": value if higher_is_better else 1 / value for split in ("train", "val")
            }
            records.append({"step": step, "epoch": 10 * step / STEPS, **every, **both})
    run.append(records)
    final = {name: value for name, value in records[-1].items() if name.startswith("val/")}
    status = "diverged" if diverges else "ok"
    run.finish(
        status,
        {
            **names,
            **{"status": status, "seed": seed, "metric": metric, "higher_is_better": higher_is_better},
            **{"steps": last, "final": final, "best": {"step": last, "value": 1.0}, "clip_fraction": 0.5},
            **{"clip_unit": "steps", "seconds": 1.2, "device": "cpu, x86_64", "threads": 1, "code": "c0ffee"},
            "time": {"data": 0.1, "forward": 0.4, "backward": 0.5, "clip+step": 0.2},
            "versions": {"python": "3.11", "torch": "2.15"},
        },
    )


@functools.cache
def made(name: str, results: Path) -> Made:
    """The table of a figure."""
    return make(PLANS[name], *ended(runs_of(PLANS[name], results)))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The runs of all figures, in one folder as with ``clipbench figures --run``."""
    folder = tmp_path_factory.mktemp("results")
    for plan in PLANS.values():
        for overrides, seed in runs_for(plan):
            make_run(folder, overrides, seed)
    return folder


@pytest.mark.parametrize("name", PLANS)
def test_a_figure_is_drawn_of_what_its_sweeps_make(name, results, tmp_path):
    plan, drawn = PLANS[name], made(name, results)
    published = Published(plan, tmp_path)
    published.write(drawn)
    assert published.check(results).problems == []
    for path in (tmp_path / plan.experiment / f"{name}.{suffix}" for suffix in ("csv", "json", "png", "pdf")):
        assert path.stat().st_size > 0
    assert imread(published.paths["png"]).std() > 0.01
    pdf = published.paths["pdf"].read_bytes()
    assert b"/CIDFontType2" in pdf  # letters, not shapes of letters
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf
    assert own_runs(plan) <= set(drawn.runs)
    assert f"{drawn.seeds} each" in drawn.caption
    assert drawn.seeds.startswith(f"{SEEDS} ")
    if "no_clip" in published.paths["csv"].read_text():
        assert "diverged" in drawn.caption


@pytest.mark.parametrize("name", PLANS)
def test_axes_are_named_and_no_legend_covers_data(name, results):
    with styled():
        figure = PLANS[name].kind.draw(read_table(made(name, results).csv))
        FigureCanvasAgg(figure).draw()
    shown = [
        axes
        for axes in figure.axes
        if axes.get_visible() and axes.has_data() and axes.axison and axes.get_label() != "<colorbar>"
    ]
    assert shown
    assert any(axes.get_xlabel() for axes in shown)
    for axes in shown:
        box = axes.get_window_extent()
        assert box.width > 30
        for legend in [*figure.legends, *filter(None, [axes.get_legend()])]:
            assert not legend.get_window_extent().overlaps(box)
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert not any("nan" in text.split() for text in texts)
    assert not any(math.isnan(value) for text in texts for value in [_number(text)])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def test_every_figure_says_what_it_is_and_how_its_runs_are_made():
    for name in PLANS:
        assert (conf_dir() / "figure" / f"{name}.yaml").read_text().startswith("# ")
        assert PLANS[name].sweeps
        experiments = {
            word for sweep in PLANS[name].sweeps for word in sweep.split() if "experiment=" in word
        }
        assert experiments == {f"experiment={experiment}" for experiment in PLANS[name].experiments}
