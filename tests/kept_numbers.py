"""Numbers that are kept in files beside the tests, for what no test can compute by hand in all its parts.

What is right, other tests check; these notice that anything moved. After a change that is meant, MOE_ZOO_REWRITE=1
writes the files anew: explain it in the commit.
"""
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch


def wave(*shape: int, slope: float = .7, start: float = 0.) -> torch.Tensor:
    """Numbers between -1 and 1 that do not repeat, with a drift, so that means are not 0."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((slope * n + start).sin() + .1 * (.013 * n).cos()).view(shape).float()


def marks(*values: torch.Tensor) -> list[float]:
    """Two numbers that change where any number of some tensors does."""
    value = torch.cat([value.detach().double().flatten() for value in values]) if values else torch.zeros(1)
    value = value.nan_to_num(nan=-9., posinf=99., neginf=-99.)
    slopes = (1 + torch.arange(value.numel(), dtype=value.dtype)).sqrt().cos()
    return [float(f'{number:.5g}') for number in (float(value @ slopes), float(value.abs().sum()))]


def close(found, kept, place: str) -> list[str]:
    """Where two results differ by more than rounding."""
    if isinstance(kept, dict):
        if not isinstance(found, dict) or sorted(kept) != sorted(found):
            return [f'{place}: {found} instead of {kept}']
        return [line for key in kept for line in close(found[key], kept[key], f'{place}, {key}')]
    if isinstance(kept, list):
        if not isinstance(found, (list, tuple)) or len(found) != len(kept):
            return [f'{place}: {found} instead of {kept}']
        return [line for n, pair in enumerate(zip(found, kept)) for line in close(*pair, f'{place} [{n}]')]
    if isinstance(kept, float):
        return [] if found == pytest.approx(kept, rel=2e-4, abs=1e-4) else [f'{place}: {found} instead of {kept}']
    return [] if found == kept else [f'{place}: {found} instead of {kept}']


def moved(file: str, cases: Mapping[str, Callable[[], Any]], name: str) -> list[str]:
    """Run a case; where it differs by more than rounding from what tests/`file` keeps of it."""
    path = Path(__file__).with_name(file)
    found = json.loads(json.dumps(cases[name]()))
    kept = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get('MOE_ZOO_REWRITE'):
        kept = {**{each: kept[each] for each in cases if each in kept}, name: found}
        lines = ',\n'.join(
            f'{json.dumps(each)}: {json.dumps(value, separators=(",", ":"))}' for each, value in kept.items())
        path.write_text(f'{{\n{lines}\n}}\n')
    return close(found, kept[name], name)


def kept_names(file: str) -> set[str]:
    return set(json.loads(Path(__file__).with_name(file).read_text()))
