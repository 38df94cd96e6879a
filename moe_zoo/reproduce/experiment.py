"""What an experiment is: arms that are trained over seeds, and claims about the differences between them.

Everything that could bend a result is written down here before anything runs: the arms, the test, the number of seeds
and, from the expected deviation, the smallest effect that the test can be trusted to find.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from moe_zoo.errors import InputError

from .training import Data

__all__ = ['Arm', 'Claim', 'Experiment']


class Arm(NamedTuple):
    """One configuration.

    Attributes:
        name: Shown in tables and charts.
        options: What `Experiment.run` is given; JSON can hold it.
    """
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """`better` minus `worse` is above 0 on `metric`: a two-sided paired t-test by seed, at 5 %.

    Attributes:
        text: The claim in words.
        metric: A number that `Experiment.run` returns.
        better, worse: Names of arms. `better` is the one that should have the larger number (where a small one is good,
            as with a loss, name the arms the other way round).
        deviation: Expected standard deviation of the difference between two runs of one seed, from a pilot on
            validation data.
        published: The paper's difference in the same unit, only where it was read in a source; None where unknown.
        source: Where `published` was read, or why nothing there can be compared.
        unit: Of `metric`.
    """
    text: str
    metric: str
    better: str
    worse: str
    deviation: float
    published: Optional[float] = None
    source: str = ''
    unit: str = 'points'


@dataclass(frozen=True)
class Experiment:
    """A question, the arms that answer it and the test that decides.

    Attributes:
        name: What `tools/reproduce.py` is given.
        title: Heading of its section on the page.
        paper: Title, venue and address of the paper.
        question: What is asked, what stands for what, and where this differs from the paper.
        arms: In the order of tables.
        claims: The first one decides the verdict line.
        run: (options of an arm, seed, data) -> metrics that JSON can hold; numbers are averaged over seeds, anything
            else is kept with its run. A top-level function: it runs in worker processes, one thread each, every random
            state having been set from the seed.
        load: Folder of --data-dir, or None -> data. A top-level function, or a `functools.partial` of one.
        seeds: How many, from 0.
        cards: Models of moe_zoo whose small version it trains; what was measured goes onto their cards.
        charts: Results (see `moe_zoo.reproduce.runner.summarise`) -> further blocks of the section.
        pictured: The README shows its first chart; publishing writes docs/figures/NAME.svg.
        files: `load` is given as a second argument the folder of the experiment, for data that must lie in files.
        computes: Further files and folders of the package that its runs compute with, see `runner.COMPUTES`.
        together: The arms of a seed share what is trained: `run` is given the options of all of them in one list, and
            returns their metrics in one list.
    """
    name: str
    title: str
    paper: str
    question: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    run: Callable[[Any, int, Data], Any]
    load: Callable[..., Data]
    seeds: int = 5
    cards: tuple[str, ...] = ()
    charts: Optional[Callable[[dict[str, Any]], Sequence[Any]]] = None
    pictured: bool = False
    together: bool = False
    files: bool = False
    computes: tuple[str, ...] = ()

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or not self.claims:
            raise InputError(f'{self.name}: arms need names of their own, and the claims at least one entry.')
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                if name not in names:
                    raise InputError(f'{self.name}: the claim {claim.text!r} names {name!r}, not one of {names}.')
