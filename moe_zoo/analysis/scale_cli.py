"""`moe-zoo estimate-scale`: memory, traffic and time of training a V-MoE on many GPUs, on paper.

Arithmetic from the shapes of the model and from rates that are given, not a measurement: which of the three is the
bottleneck, and by about how much. The way to train is that of `--parallel fsdp --expert-parallel N`: everything but the
experts sharded over all GPUs, the experts spread over N, gradient checkpointing in every block, float32 weights and
AdamW. Units: bytes, seconds, MACs (a multiply-accumulate is one); 1 GB is 1e9 bytes.

Letters: G GPUs, N of them share the experts, b images a GPU at a time, A times a step, T tokens an image, D width,
M hidden width of an expert, E experts, K chosen ones.
"""
import argparse
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import moe_zoo  # noqa: F401  registers the models
from moe_zoo.errors import InputError, exit_on_input_error, nearest

from ..layers.expert_mlps import ExpertMlps
from .cost import count

WORD = 4  # bytes of a float32: weights, gradients, moments, tokens that travel
STATE = 4 * WORD  # of a parameter: itself, its gradient, two moments
PASSES = 4  # forwards a training step is worth: forward, recomputed forward, and a backward of two
EXAMPLES = """
examples:
  %(prog)s vmoe_vit_h
  %(prog)s vmoe_vit_l --gpus 16 128 --network 50
  %(prog)s vmoe_vit_h --expert-parallel 4 --images 16 --batch 8192
"""


@dataclass(frozen=True)
class Rates:
    """What a GPU does a second, sustained.

    Attributes:
        macs: MACs.
        node: Bytes that it sends to others in its node.
        network: Bytes that it sends to other nodes.
        per_node: GPUs a node.
    """
    macs: float
    node: float
    network: float
    per_node: int

    def ring(self, gpus: int) -> float:
        """Bytes a second of a ring over all GPUs, which leaves a node by the network cards of all its GPUs."""
        return self.node if gpus <= self.per_node else min(self.node, self.per_node * self.network)


@dataclass(frozen=True)
class Shapes:
    """A vision transformer whose experts are spread.

    Attributes:
        dense, expert: Parameters that are no expert's, and those of all experts.
        block: Parameters of the largest block without its experts.
        macs: Of the forward of an image, at most.
        tokens, width, depth: T, D and the number of blocks.
        routed: Blocks with experts.
        experts, selected, hidden: E, K, M.
    """
    dense: int
    expert: int
    block: int
    macs: int
    tokens: int
    width: int
    depth: int
    routed: int
    experts: int
    selected: int
    hidden: int


@dataclass(frozen=True)
class Estimate:
    """Of a GPU: bytes of memory, bytes sent in a step, seconds of a step."""
    gpus: int
    shared_by: int
    images: int
    times: int
    memory_state: float
    memory_block: float
    memory_activations: float
    sent_shards: float
    sent_gradients: float
    sent_tokens: float
    seconds_compute: float
    seconds_shards: float
    seconds_gradients: float
    seconds_tokens: float

    @property
    def memory(self) -> float:
        return self.memory_state + self.memory_block + self.memory_activations

    @property
    def seconds(self) -> tuple:
        """A step at best, where all that is sent hides behind computing or the other way round, and at worst."""
        sending = self.seconds_shards + self.seconds_gradients + self.seconds_tokens
        return max(self.seconds_compute, sending), self.seconds_compute + sending


def shapes_of(name: str, **kwargs: Any) -> Shapes:
    """The shapes of a model, which is built without weights.

    Raises:
        InputError: The name is unknown, or it is no vision transformer with experts of tokens.
    """
    if not timm.is_model(name):
        raise InputError(f'Unknown model {name!r}.{nearest(name, timm.list_models())}')
    model = timm.create_model(name, device='meta', **kwargs)
    layers = [module for module in model.modules() if isinstance(module, ExpertMlps)]
    if not isinstance(model, VisionTransformer) or not layers:
        raise InputError(f'{name}: the estimate is of vision transformers with experts of tokens, such as vmoe_vit_h.')
    expert = sum(map(_experts_of, layers))
    image = torch.empty(1, *model.default_cfg['input_size'], device='meta')
    return Shapes(
        dense=sum(p.numel() for p in model.parameters()) - expert,
        expert=expert,
        block=max(sum(p.numel() for p in block.parameters()) - _experts_of(block) for block in model.blocks),
        macs=count(model, image).macs_max,
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        width=model.embed_dim,
        depth=len(model.blocks),
        routed=len(layers),
        experts=layers[0].num_experts,
        selected=layers[0].num_selected,
        hidden=layers[0].hidden_features,
    )


def _experts_of(module: nn.Module) -> int:
    """Parameters of the experts below a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, ExpertMlps)]
    return sum(p.numel() for layer in layers for group in layer.expert_parameters() for p in group)


def estimate(shapes: Shapes, rates: Rates, gpus: int, batch: int, images: int, shared_by: int) -> Estimate:
    """One step of `batch` images on `gpus` GPUs, `images` each at a time, experts spread over `shared_by`.

    - state: STATE (dense / G + expert / N); block: two of them gathered at a time, 2 WORD block;
    - activations: the input of every block, and in the block at work the outputs of its matrix products (queries, keys,
      values, attention, projection and K experts) with their gradients: WORD b T (depth D + 2 (5 D + K (M + D)));
    - shards: gathered for forward and backward, gradients scattered, each A times: 3 A WORD dense (G - 1) / G;
    - expert gradients: ring all-reduce over the G / N that hold the same: 2 A WORD expert / N (G / N - 1) / (G / N);
    - tokens: there and back, in forward, recomputation and backward: 6 A routed b T K D WORD (N - 1) / N.

    Raises:
        InputError: The numbers do not divide each other.
    """
    G, N, b = gpus, shared_by, images
    if G % N or shapes.experts % N:
        raise InputError(f'--expert-parallel {N} does not divide {G} GPUs and {shapes.experts} experts: use a divisor.')
    if batch % (G * b):
        raise InputError(f'--batch {batch} is no multiple of {G} GPUs x {b} images: choose other numbers.')
    A, s, same = batch // (G * b), shapes, G // N
    shards = 3 * A * WORD * s.dense * (G - 1) / G
    gradients = 2 * A * WORD * s.expert / N * (same - 1) / same
    tokens = 6 * A * s.routed * b * s.tokens * s.selected * s.width * WORD * (N - 1) / N
    across = 0 if N <= rates.per_node else (N - rates.per_node) / (N - 1)  # share of the tokens that leave the node
    working = 2 * (5 * s.width + s.selected * (s.hidden + s.width))
    return Estimate(
        G, N, b, A,
        memory_state=STATE * (s.dense / G + s.expert / N),
        memory_block=2 * WORD * s.block,
        memory_activations=WORD * b * s.tokens * (s.depth * s.width + working),
        sent_shards=shards,
        sent_gradients=gradients,
        sent_tokens=tokens,
        seconds_compute=PASSES * A * b * s.macs / rates.macs,
        seconds_shards=shards / rates.ring(G),
        seconds_gradients=gradients / (rates.node if G <= rates.per_node else rates.network),
        seconds_tokens=tokens * ((1 - across) / rates.node + across / rates.network),
    )


def table(found: Sequence[Estimate], batch: int) -> str:
    """Estimates as a Markdown table, a row a number of GPUs."""
    head = ('GPUs', 'experts over', 'images x times', 'memory GB: state + block + activations',
            'sent GB a step: shards, expert gradients, tokens', 'computing s', 'sending s', 'step s', 'images/s')
    rows = [head, ('---:',) * len(head)]
    for e in found:
        sending = e.seconds_shards + e.seconds_gradients + e.seconds_tokens
        best, worst = e.seconds
        rows.append((
            f'{e.gpus}', f'{e.shared_by}', f'{e.images} x {e.times}',
            f'{e.memory_state / 1e9:.1f} + {e.memory_block / 1e9:.1f} + {e.memory_activations / 1e9:.1f}'
            f' = {e.memory / 1e9:.1f}',
            f'{e.sent_shards / 1e9:.1f}, {e.sent_gradients / 1e9:.1f}, {e.sent_tokens / 1e9:.1f}',
            f'{e.seconds_compute:.2f}', f'{sending:.2f}', f'{best:.2f} to {worst:.2f}',
            f'{batch / worst:,.0f} to {batch / best:,.0f}'))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Memory, traffic and time of training a V-MoE on many GPUs, on paper, from rates that you give.',
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add('model', metavar='MODEL', help='a vision transformer with experts, as `moe-zoo list vmoe` has them')
    add('--gpus', nargs='+', type=int, default=[8, 64, 512], metavar='G')
    add('--batch', type=int, default=4096, help='images a step, over all GPUs (default 4096)')
    add('--images', type=int, default=8, help='images a GPU at a time (default 8)')
    add('--expert-parallel', type=int, metavar='N', help='GPUs that share the experts (default: as many as experts)')
    add('--macs', type=float, default=60., help='1e12 MACs a second and GPU, sustained (default 60)')
    add('--node', type=float, default=200., help='GB a second and GPU inside a node (default 200)')
    add('--network', type=float, default=20., help='GB a second and GPU between nodes (default 20)')
    add('--per-node', type=int, default=8, help='GPUs a node (default 8)')
    return result


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> int:
    """Print the table; returns the exit code."""
    args = parser().parse_args(argv)
    for name in ('batch', 'images', 'macs', 'node', 'network', 'per_node'):
        if not getattr(args, name) > 0:
            raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)}: give a number above 0.')
    shapes = shapes_of(args.model)
    rates = Rates(args.macs * 1e12, args.node * 1e9, args.network * 1e9, args.per_node)
    shared_by = args.expert_parallel or shapes.experts
    found = [estimate(shapes, rates, gpus, args.batch, args.images, min(shared_by, gpus)) for gpus in args.gpus]
    print(table(found, args.batch))
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
