"""Routers that start from the clusters of the tokens they will route. Letters: N tokens, D width, E experts."""
import torch
from torch.nn import functional as F

from ..errors import InputError


def router_of_clusters(tokens: torch.Tensor, num_experts: int, steps: int = 25) -> torch.Tensor:
    """Weights of a linear router whose logits are the nearness to the E clusters of tokens.

    Tokens are taken relative to their mean, as directions, and clustered by their angles (spherical k-means). The
    mean's own direction is taken out of the centres, because a router without bias could not subtract it, and the
    logits of these tokens are scaled to a standard deviation of one.

    Args:
        tokens: (N, D), at least E of them.
        num_experts: E.
        steps: Rounds of the clustering, which ends where nothing changes.

    Returns:
        (E, D), float32.

    Raises:
        InputError: There are fewer tokens than experts.
    """
    if len(tokens) < num_experts:
        raise InputError(f'{num_experts} experts need as many tokens at least, and there are {len(tokens)}.')
    tokens = tokens.detach().float()
    mean = tokens.mean(dim=0)
    x = F.normalize(tokens - mean, dim=1)
    generator = torch.Generator().manual_seed(0)
    centres = _far_apart(x, num_experts, generator)
    nearest = None
    for _ in range(steps):
        likeness = x @ centres.t()  # (N, E)
        chosen = likeness.argmax(dim=1)
        if nearest is not None and torch.equal(chosen, nearest):
            break
        nearest = chosen
        sums = torch.zeros_like(centres).index_add(0, chosen, x)
        empty = torch.bincount(chosen, minlength=num_experts) == 0
        # An empty cluster begins anew at the tokens that their centres like least.
        sums[empty] = x[likeness.max(dim=1).values.argsort()[:int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
    direction = F.normalize(mean, dim=0)
    centres = centres - (centres @ direction).unsqueeze(1) * direction
    return centres / (tokens @ centres.t()).std().clamp_min(1e-6)


def _far_apart(x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """First centres: a token at random, then one by one the tokens with a chance that grows with their distance."""
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    while len(chosen) < count:
        distance = (1 - (x @ x[chosen].t()).max(dim=1).values).clamp_min(1e-12)
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return x[chosen]
