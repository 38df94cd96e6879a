"""Which patch of one view shows what a patch of the other view shows: pure tensor code, whole batches at a time.

As in PRC (see `moe_zoo.data.two_views`): the centre of every patch of the finer view, whose crop is smaller, is carried
into the other view and belongs to the nearest patch there. Several patches may share one; outside is no match.

Letters: B images, h x w patches of a grid, N tokens of an image, prefix tokens included.
"""
from typing import NamedTuple, Tuple

import torch


class Grid(NamedTuple):
    """How the routed items of an image lie: so many prefix tokens (a class token), then `rows` x `columns` patches."""
    rows: int
    columns: int
    num_prefix_tokens: int = 0


def match_patches(
        maps: torch.Tensor,
        areas: torch.Tensor,
        image_size: Tuple[int, int],
        grid: Grid,
        match_prefix: bool = True,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The token of the coarser view that every token of the finer view corresponds to.

    Args:
        maps: (B, 2, 3, 3), points (y, x, 1) of the images to points of each view.
        areas: (B, 2) what the crops cover; the view with the smaller crop is the finer one, view 1 of equal ones.
        image_size: Height and width of the views in pixels.
        grid: Of the tokens, the same for both views.
        match_prefix: Whether a prefix token corresponds to itself in the other view (the released configurations of PRC
            do so), or to nothing. Where the views share no patch it has no counterpart either.

    Returns:
        index: (B, N) int64 token of the coarser view; -1 where there is none.
        finer: (B,) int64, 0 or 1: the finer view.
    """
    rows, columns, prefix = grid
    finer = (areas[:, 1] < areas[:, 0]).long()
    image = torch.arange(len(maps), device=maps.device)
    fine, coarse = maps[image, finer], maps[image, 1 - finer]
    across = coarse @ torch.linalg.inv_ex(fine).inverse  # (B, 3, 3), finer to coarser view

    patch = torch.tensor([image_size[0] / rows, image_size[1] / columns], device=maps.device, dtype=maps.dtype)
    y = (torch.arange(rows, device=maps.device) + 0.5) * patch[0]
    x = (torch.arange(columns, device=maps.device) + 0.5) * patch[1]
    y, x = torch.meshgrid(y, x, indexing='ij')
    centres = torch.stack([y, x, torch.ones_like(x)]).flatten(1).to(maps.dtype)  # (3, h w)

    points = across @ centres  # (B, 3, h w)
    nearest = (points[:, :2] / points[:, 2:] / patch.unsqueeze(1) - 0.5).round()
    beyond = torch.tensor([rows, columns], device=maps.device).unsqueeze(1)
    inside = (points[:, 2] > 0) & ((nearest >= 0) & (nearest < beyond)).all(dim=1)
    nearest = torch.where(inside.unsqueeze(1), nearest, 0).long()
    index = torch.where(inside, prefix + nearest[:, 0] * columns + nearest[:, 1], -1)
    own = torch.arange(prefix, device=maps.device).expand(len(maps), prefix)
    own = torch.where(inside.any(dim=1, keepdim=True) & match_prefix, own, -1)
    return torch.cat([own, index], dim=1), finer


def match_items(
        maps: torch.Tensor,
        areas: torch.Tensor,
        image_size: Tuple[int, int],
        grid: Grid,
        match_prefix: bool = True,
) -> torch.Tensor:
    """`match_patches` as pairs of item numbers of a routing record of 2B images, view 1 of all and then view 2.

    Returns:
        (2, B, N) int64: rows of `Routing.logits` for the tokens of the finer view, and for their counterparts in the
        coarser view; -1 in both where there is none.
    """
    index, finer = match_patches(maps, areas, image_size, grid, match_prefix)
    B, N = index.shape
    image = torch.arange(B, device=index.device)
    fine = ((finer * B + image) * N).unsqueeze(1) + torch.arange(N, device=index.device)
    coarse = (((1 - finer) * B + image) * N).unsqueeze(1) + index
    return torch.where(index >= 0, torch.stack([fine, coarse]), -1)
