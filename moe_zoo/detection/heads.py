"""A head for detectron2's RetinaNet with experts for its sub-nets or for parts of them: K of E for every pyramid level.

The heads of Pavlitska et al. 2022 (arXiv 2204.10598): a gate sees one level of the feature pyramid at a time, so that
experts can follow the size of objects; one loss balances the decisions on all levels together. Each of the two
sub-nets, for classes and for boxes, is a tower of convolutions and a prediction layer.

Letters: B images, L levels, C channels, H x W positions, E experts, K chosen experts.
"""
import copy
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from ..errors import InputError, nearest
from ..layers.image_moe import must_be_static
from ..layers.moe_stage import MoEStage
from ..routing import Routing, record

SUBNETS = {'cls': ('cls',), 'box': ('bbox',), 'both': ('cls', 'bbox')}
EXPERTS = {
    'subnet': 'the whole sub-net: its tower and its prediction layer (default)',
    'last_conv': 'the last convolution of the tower, with its norm and ReLU; the prediction layer behind it is shared',
    'output': 'the prediction layer; the tower is shared',
}
GATES_PER = {
    'level': 'one decision for every level of an image, from that level (default)',
    'image': 'one decision for an image, from the mean of the pooled levels',
}
_PREDICTION = {'cls': 'cls_score', 'bbox': 'bbox_pred'}


class LevelExperts(MoEStage):
    """K of E experts for every level of every image, or for every image; each runs on the maps that chose it.

    `decide` looks at all levels, once, and records; `forward` runs the experts on one level.

    Args:
        experts: E modules from (B, ., H, W) to maps of one common shape.
        in_chs: C, of the levels that the gate sees.
        gate_per: A key of `GATES_PER`.
        follows: Take the decisions of another layer: no gate, and no record.
        kwargs: As in `MoEStage`.
    """

    def __init__(
            self,
            experts: Sequence[nn.Module],
            in_chs: int,
            gate_per: str = 'level',
            follows: bool = False,
            **kwargs,
    ):
        super().__init__(experts, in_chs, **kwargs)
        self.gate_per = gate_per
        if follows:
            self.gate = self.router = None

    def decide(self, features: List[torch.Tensor]) -> Routing:
        """L maps (B, C, H, W), finest first. Padding is left out; it differs from level to level."""
        pooled = torch.stack([self.gate(x) for x in features], dim=1)  # (B, L, features of the gate)
        if self.gate_per == 'image':
            routing = self.router(pooled.mean(dim=1))
        else:
            routing = self.router(pooled.flatten(0, 1))._replace(shape=tuple(pooled.shape[:2]), levels=len(features))
        record(self, routing)
        return routing

    def forward(self, x: torch.Tensor, routing: Routing, level: int) -> torch.Tensor:
        """x: (B, ., H, W), what the experts read of a level. Returns maps of the experts' shape."""
        for module in self.experts.modules():
            if isinstance(module, CycleBatchNormList):  # it counts calls, and an expert is not called on every level
                module._pos = level
        routing = at_level(routing, level)
        return self.combine_reference(x, routing) if must_be_static(x) else self.combine_sparse(x, routing)

    def gate_macs(self, num_images: int) -> int:
        """None inside `forward`: the decision is made, and its cost counted, before."""
        return 0

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, gate_per={self.gate_per!r}, follows={self.router is None}'


def at_level(routing: Routing, level: int) -> Routing:
    """The decisions on one level: a record of B images."""
    if not routing.levels:
        return routing
    fields = {name: getattr(routing, name) for name in ('logits', 'gates', 'weights', 'indices', 'kept')}
    fields = {name: None if f is None else f[level::routing.levels] for name, f in fields.items()}
    return Routing(**fields, shape=routing.shape[:1])


class MoERetinaNetHead(RetinaNetHead):
    """detectron2's RetinaNetHead with experts; takes its place in a config, a LazyConfig or a call.

    A dense head's weights become those of every expert. The gates of the chosen sum to one, so that a detector starts
    with the detections of the dense one; the gate's noise then sends levels to other experts, which parts them.

    Args:
        subnets: A key of `SUBNETS`: which are routed.
        experts: A key of `EXPERTS`: what of a sub-net an expert is. The gate sees the level itself in every case.
        gate_per: A key of `GATES_PER`.
        shared_gate: One gate for both sub-nets; else each has its own.
        num_experts: E.
        num_selected: K.
        gate: A key of `moe_zoo.layers.image_moe.GATES`. The authors' code computes 'relu_gap_fc' here, by a slip.
        constraint: A key of `moe_zoo.layers.image_moe.CONSTRAINTS`, over all levels at once.
        constraint_value: Its weight, threshold or rate; None is its default.
        noise: Learned noise on the gate in training; None is yes, but not under 'relative' and 'mean'.
        losses: Further (name, weight) auxiliary losses.
        perturb: How far copies of the dense weights are moved apart, relative to their standard deviation. Above 0 the
            detections change.
        kwargs: As in RetinaNetHead: input_shape, num_classes, num_anchors, conv_dims, norm, prior_prob.

    Raises:
        InputError: An unknown choice, a gate shared by one sub-net, K not between 1 and E, or a SyncBatchNorm.
    """

    @configurable
    def __init__(
            self,
            *,
            subnets: str = 'both',
            experts: str = 'subnet',
            gate_per: str = 'level',
            shared_gate: bool = False,
            num_experts: int = 4,
            num_selected: int = 2,
            gate: str = 'gap_fc',
            constraint: Optional[str] = 'kl',
            constraint_value: Optional[float] = 0.25,
            noise: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (),
            perturb: float = 0.,
            **kwargs,
    ):
        super().__init__(**kwargs)
        for argument, value, known in (
                ('subnets', subnets, SUBNETS), ('experts', experts, EXPERTS), ('gate_per', gate_per, GATES_PER)):
            if value not in known:
                raise InputError(f'{argument}={value!r} (MOE.HEAD.{argument.upper()}) is not one of '
                                 f'{", ".join(known)}.{nearest(value, known)}')
        if shared_gate and subnets != 'both':
            raise InputError(f"shared_gate=True with subnets={subnets!r}: two sub-nets share a gate, use 'both'.")
        if num_experts < 1:
            raise InputError(f'num_experts={num_experts}: a routed head needs at least one expert.')
        self.routed = SUBNETS[subnets]
        self.shared_gate = shared_gate
        for name in self.routed:
            expert = self._take_expert(name, experts)
            layer = LevelExperts(
                [expert, *(_drawn_anew(expert) for _ in range(num_experts - 1))],
                kwargs['input_shape'][0].channels, gate_per, shared_gate and name != self.routed[0],
                num_selected=num_selected, gate=gate, constraint=constraint, constraint_value=constraint_value,
                noise=noise, losses=losses, perturb=perturb)
            setattr(self, f'{name}_experts', layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: List[ShapeSpec]) -> Dict[str, Any]:
        """The arguments by MODEL.RETINANET and MOE.HEAD."""
        options = cfg.MOE.HEAD
        return {
            **super().from_config(cfg, input_shape),
            'subnets': options.SUBNETS,
            'experts': options.EXPERTS,
            'gate_per': options.GATE_PER,
            'shared_gate': options.SHARED_GATE,
            'num_experts': options.NUM_EXPERTS,
            'num_selected': options.NUM_SELECTED,
            'gate': options.GATE,
            'constraint': options.CONSTRAINT,
            'constraint_value': options.CONSTRAINT_VALUE,
            'noise': options.NOISE,
            'losses': [tuple(pair) for pair in options.LOSSES],
            'perturb': options.PERTURB,
        }

    def _take_expert(self, name: str, experts: str) -> nn.Sequential:
        """Take what is to be an expert out of a dense sub-net; its tensors keep their names."""
        tower, prediction = f'{name}_subnet', _PREDICTION[name]
        layers = OrderedDict(getattr(self, tower).named_children())
        if experts != 'last_conv':
            taken = OrderedDict({prediction: getattr(self, prediction)})
            setattr(self, prediction, nn.Identity())
            if experts == 'subnet':
                taken = OrderedDict({tower: getattr(self, tower), **taken})
                setattr(self, tower, nn.Identity())
            return nn.Sequential(taken)
        conv = max(int(number) for number, layer in layers.items() if isinstance(layer, nn.Conv2d))
        last = OrderedDict((number, layers.pop(number)) for number in list(layers) if int(number) >= conv)
        setattr(self, tower, nn.Sequential(layers))
        return nn.Sequential(OrderedDict({tower: nn.Sequential(last)}))

    def forward(self, features: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """L maps (B, C, H, W), finest first. Returns class logits and box deltas of every level, as the dense head."""
        assert len(features) == self._num_features
        deciding = self.routed[:1] if self.shared_gate else self.routed
        routings = {name: getattr(self, f'{name}_experts').decide(features) for name in deciding}
        if self.shared_gate:
            routings = dict.fromkeys(self.routed, routings[self.routed[0]])
        maps: Dict[str, List[torch.Tensor]] = {'cls': [], 'bbox': []}
        for level, feature in enumerate(features):
            for name in maps:
                x = getattr(self, f'{name}_subnet')(feature)
                if name in routings:
                    x = getattr(self, f'{name}_experts')(x, routings[name], level)
                maps[name].append(getattr(self, _PREDICTION[name])(x))
        return maps['cls'], maps['bbox']

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Weights of a dense head, found under its names, go to the layer that makes experts of them."""
        for name in self.routed:
            for key in getattr(self, f'{name}_experts').experts[0].state_dict():
                if prefix + key in state_dict:
                    state_dict[f'{prefix}{name}_experts.{key}'] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _drawn_anew(expert: nn.Module) -> nn.Module:
    """A copy whose convolutions are drawn by themselves, as detectron2 draws them; biases are as they were."""
    drawn = copy.deepcopy(expert)
    for module in drawn.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
    return drawn


def train_experts_only(model: nn.Module) -> None:
    """Freeze all of a detector but the experts and gates of its head, norms included.

    Raises:
        InputError: Its head has none.
    """
    layers = [module for module in model.modules() if isinstance(module, LevelExperts)]
    if not layers:
        raise InputError('MOE.HEAD.TRAIN_ONLY_NEW True: the head has no experts; set MOE.HEAD.SUBNETS to cls, box or '
                         'both.')
    new = {id(module) for layer in layers for module in layer.modules()}
    for module in [module for module in model.modules() if id(module) not in new]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        for name, child in list(module.named_children()):
            if isinstance(child, (BatchNormAct2d, SyncBatchNormAct)):  # of timm's, whose activation must stay
                setattr(module, name, freeze_batch_norm_2d(child))
            elif isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(module, name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
