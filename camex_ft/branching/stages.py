"""Steps of a study: start -> branches and baselines -> merged models, each an ordinary run.

A step's configuration names the runs that it continues: the start's model as its backbone, and the branches as its
donors. Before these are done, the study's own backbone stands for them, so that all steps are validated first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camex_ft.branching.study import DENSE, START, UNTRAINED, StudySpec
from camex_ft.compare.cells import LONGEST, Cell
from camex_ft.compare.spec import NAME, key_of, overrides_of
from camex_ft.config import Config, ConfigErrors, Environment, Problem, config_hash, load_config, resolve
from camex_ft.config.problems import Key, Origin
from camex_ft.config.schema import CHECKPOINTS
from camex_ft.run.pipeline import MODEL

PROTOCOL, STEPS = "merging.protocol", "training.max_steps"


@dataclass(frozen=True, kw_only=True)
class StudyStep:
    """A step of a study, with a run for each seed.

    Attributes:
        label: of its row.
        keys: changes to the configuration, by dotted key.
        needs: labels of the steps whose runs it continues.
        donors: of these, the branches that become its experts.
        places: where the changes are written in the specification.
    """

    label: str
    keys: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    donors: tuple[str, ...] = ()
    places: tuple[Key, ...] = ()

    @property
    def untrained(self) -> bool:
        """Return whether it is a merged model that is evaluated as it begins."""
        return bool(self.donors) and self.keys.get(STEPS) == UNTRAINED


Runs = Mapping[tuple[str, int], Path]  # label, seed -> folder of a finished run


@dataclass(frozen=True, kw_only=True)
class Study:
    """A specification with its steps.

    Attributes:
        name: of its folder, such as "domains".
        spec: the specification.
        reason: the profile in force, and the reason for it.
        shared: overrides of every step.
        base: the resolved configuration of these: all data, and the backbone.
        stages: the steps; those of a stage need only steps of earlier stages.
    """

    name: str
    spec: StudySpec
    reason: str
    shared: tuple[str, ...]
    base: Config = field(repr=False)
    stages: tuple[tuple[StudyStep, ...], ...]

    @property
    def title(self) -> str:
        """Its heading."""
        return self.spec.title or f"{self.base.task.id}: {len(self.spec.branches)} branches of one start"

    @property
    def folder(self) -> Path:
        """Folder of its report, scores and logs."""
        return self.base.output.path / "branches" / self.name

    @property
    def steps(self) -> tuple[StudyStep, ...]:
        """All steps."""
        return tuple(step for stage in self.stages for step in stage)

    def overrides(self, step: StudyStep, seed: int, runs: Runs | None = None) -> list[str]:
        """Return the overrides of a step's run; without `runs`, the study's backbone stands for those it needs."""

        def run(label: str) -> str:
            return self.base.backbone if runs is None else str(runs[label, seed])

        changes: dict[str, Any] = {PROTOCOL: DENSE, **step.keys, "output.model": True}
        if START in step.needs and runs is not None:
            changes["backbone"] = str(runs[START, seed] / MODEL)
        if step.donors:
            changes |= {"upcycle.init": CHECKPOINTS, "upcycle.from": [run(label) for label in step.donors]}
        if step.untrained:
            del changes[STEPS]
        own = [*self.shared, *overrides_of(changes), f"training.seed={seed}"]
        return list({key_of(text): text for text in own}.values())  # the last of a key wins

    def cell(
        self,
        step: StudyStep,
        seed: int,
        runs: Runs | None = None,
        *,
        environment: Environment | None = None,
        needs: bool = False,
    ) -> Cell:
        """Return a step's run as a cell.

        Args:
            step, seed: of the run.
            runs: finished runs, those that the step needs among them; None: the study's backbone stands for them.
            environment: of the machine.
            needs: check that all that the run needs is there.

        Raises:
            ConfigErrors: the configuration is not valid.
        """
        overrides = self.overrides(step, seed, runs)
        settled, _ = resolve(load_config(self.spec.config, overrides), environment, needs=needs)
        return Cell(
            task=settled.task.id,
            row=step.label,
            keys=step.keys,
            seed=seed,
            config=self.spec.config,
            overrides=tuple(overrides),
            settled=settled,
        )


def make_study(
    spec: StudySpec,
    *,
    name: str = "",
    overrides: Sequence[str] = (),
    seeds: int | list[int] | None = None,
    environment: Environment | None = None,
) -> Study:
    """Return a specification's steps, all of them validated on this machine.

    Args:
        spec: the specification.
        name: of the study; by default its task's.
        overrides: further ``key=value`` for every step; changes of a step win.
        seeds: in place of the specification's.
        environment: of the machine.

    Raises:
        ConfigErrors: the mistakes of all steps together.
    """
    environment = environment or Environment()
    if seeds is not None:
        spec = spec.model_copy(update={"seeds": seeds})
    try:
        written = load_config(spec.config, [*overrides_of(spec.set), *overrides])
        base, reason = resolve(written, environment, needs=False)
    except ConfigErrors as errors:
        raise ConfigErrors(map(spec.placed, errors.problems)) from None
    shared = [o for o in (*overrides_of(spec.set), *overrides) if key_of(o) != "profile"]
    study = Study(
        name=re.sub(r"[^\w.-]+", "-", name or base.task.id).strip("-.")[:LONGEST],
        spec=spec,
        reason=reason,
        shared=(*shared, f"profile={base.profile}"),
        base=base,
        stages=tuple(map(tuple, _stages(spec))),
    )
    problems = [*_idle(study, overrides), *_without_steps(study)]
    for stage in study.stages:
        hashes: dict[str, str] = {}
        for step in stage:
            try:
                cell = study.cell(step, spec.seed_list()[0], environment=environment, needs=True)
            except ConfigErrors as errors:
                problems += [spec.placed(problem, *step.places) for problem in errors.problems]
                continue
            digest = config_hash(cell.settled, data=str(cell.settled.data.dir or "")) + str(step.untrained)
            same = hashes.setdefault(digest, step.label)
            if same != step.label:
                message = f"'{same}' and '{step.label}' are the same run: expected different changes"
                problems.append(Problem(message, key=step.places[-1]))
    if problems:
        raise ConfigErrors(problems)
    return study


def _stages(spec: StudySpec) -> Iterable[list[StudyStep]]:
    start = () if spec.start == "none" else (START,)
    if spec.start != "none":
        yield [StudyStep(label=START, keys=spec.start, places=(("start",),))]
    branches = []
    for n, (label, changes) in enumerate(zip(spec.labels, spec.branches, strict=True)):
        own = {key: value for key, value in changes.items() if key != NAME}
        places = (("branches", str(n)), ("branch",))
        branches.append(StudyStep(label=label, keys={**spec.branch, **own}, needs=start, places=places))
    baselines = []
    for label, changes in spec.baselines.items():
        counted = STEPS in changes or "training.num_train_epochs" in changes
        steps = {} if counted else {STEPS: budget(spec)}
        place = (("baselines", label),)
        baselines.append(StudyStep(label=label, keys={**steps, **changes}, needs=start, places=place))
    yield [*baselines, *branches]  # the longest first
    donors = tuple(step.label for step in branches)
    yield [
        StudyStep(
            label=label, keys=changes, needs=(*start, *donors), donors=donors, places=(("merged", label),)
        )
        for label, changes in spec.merged.items()
    ]


def budget(spec: StudySpec) -> int:
    """Return the optimizer steps of all branches and of the longest tuning; -1 if one of them counts epochs."""
    branches = [{**spec.set, **spec.branch, **branch}.get(STEPS) for branch in spec.branches]
    tunings = [{**spec.set, **merged}.get(STEPS) for merged in spec.merged.values()]
    counts = [steps for steps in (*branches, *tunings) if isinstance(steps, int) and steps >= 0]
    if len(counts) < len(branches) + len(tunings):
        return -1
    return sum(counts[: len(branches)]) + max(counts[len(branches) :])


def _without_steps(study: Study) -> Iterable[Problem]:
    """Yield a problem for each baseline whose steps do not follow from those of the others."""
    for step in study.steps:
        if step.places[0][0] == "baselines" and step.keys.get(STEPS) == -1 and budget(study.spec) == -1:
            yield Problem(
                "expected training.max_steps or training.num_train_epochs, since the branches or merged models count "
                "epochs",
                key=step.places[0],
            )


def _idle(study: Study, overrides: Sequence[str]) -> Iterable[Problem]:
    """Yield a problem for each override without effect on any step."""
    for text in overrides:
        key = key_of(text)
        if key == "training.seed":
            yield Problem("training.seed is set by --seeds here", Origin(f"override '{text}'"))
        elif all(key in step.keys for step in study.steps):
            yield Problem(
                f"{key} has no effect here: each step sets it. Change the specification",
                Origin(f"override '{text}'"),
            )
