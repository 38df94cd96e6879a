"""The state of an optimiser from a file: torch looks at how many parameters it is of, and takes all else as it is."""
from typing import Any, Dict, List

import torch


def refuse_odd_options(fresh: List[Dict[str, Any]], loaded: List[Dict[str, Any]]) -> None:
    """Compare the options of parameter groups with those that the optimiser was made with.

    Args:
        fresh: `param_groups` before `load_state_dict`.
        loaded: The same afterwards.

    Raises:
        ValueError: An option is of another kind.
    """
    for wanted, found in zip(fresh, loaded):
        for name in wanted.keys() & found.keys() - {'params'}:
            if not _alike(found[name], wanted[name]):
                raise ValueError(f'its {name} is {str(found[name])[:60]!r}')


def _alike(found: Any, wanted: Any) -> bool:
    """Whether an option is of the kind that is wanted: a number, or several."""
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(wanted) and all(map(_alike, found, wanted))
    if wanted is None or isinstance(wanted, (int, float, torch.Tensor)):
        optional = wanted is None or wanted is False
        return isinstance(found, (int, float, torch.Tensor)) or (found is None and optional)
    return type(found) is type(wanted)
