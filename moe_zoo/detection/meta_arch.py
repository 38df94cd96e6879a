"""detectron2's detectors with routed layers: the outermost forward, which collects their records, for any of them.

    MoECascade = with_moe_losses(MyCascadeRCNN)
"""
import logging
import math
from typing import Any, Dict, List, Tuple, Type

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch import FCOS
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import InputError
from ..layers import RoutedLayer
from ..layers.moe_stage import MoEStage
from ..losses import auxiliary_losses, balance
from ..routing import RoutingContext, end_step_after_optimizer, routing_context, set_epoch
from .heads import MoERetinaNetHead, train_experts_only
from .resnet_backbone import UpcycledStage

_LOGGER = logging.getLogger(__name__)
LOG_PERIOD = 20  # iterations; detectron2's writers have the same period


class MoELosses:
    """Mixin of a meta-architecture, first in its bases, which opens one routing context for one forward.

    The context carries the true sizes of the padded images to the gates and collects what the routers decide. In
    training every auxiliary loss that a layer asks for enters the loss dictionary as `loss_moe_<name>`, and, every 20
    iterations, the share of each expert goes to the event storage as `moe/<layer>/expert<e>_share` with its coefficient
    of variation `moe/<layer>/cv`: never into the dictionary, whose every entry detectron2 adds to the loss. Nothing is
    left on the module.

    Routers that adapt between steps (hard constraints, a selection bias) are told of every step of an optimiser of the
    model, whichever trainer takes it. Of epochs, which the temperature of Dynamic Convolution follows, a trainer tells
    by `EpochHook`; under one that does not, such as detectron2's own tools, they follow from `iterations_per_epoch`.

    Statistics of a distributed run are those of one rank's images.

    Args:
        args, kwargs: As in the base.
        iterations_per_epoch: Images of the training set by images a batch; MOE.ITERATIONS_PER_EPOCH of a config.
    """

    def __init__(self, *args, iterations_per_epoch: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        if args and isinstance(args[0], CfgNode):
            iterations_per_epoch = args[0].MOE.ITERATIONS_PER_EPOCH
            if args[0].MOE.HEAD.SUBNETS != 'none':  # which MoERetinaNet has read
                raise InputError(f'MOE.HEAD.SUBNETS {args[0].MOE.HEAD.SUBNETS!r}: only MODEL.META_ARCHITECTURE '
                                 f"MoERetinaNet has such a head; set 'none' for {type(self).__name__}.")
        if iterations_per_epoch < 0:
            raise InputError(f'MOE.ITERATIONS_PER_EPOCH {iterations_per_epoch}: use a number above 0, or 0 where a '
                             'trainer tells of epochs.')
        self.iterations_per_epoch = iterations_per_epoch
        self.epochs_are_settled = False
        end_step_after_optimizer(self)

    def set_epoch(self, epoch: int) -> None:
        """Called where a trainer tells of epochs."""
        self.epochs_are_settled = True

    def _follow_epochs(self) -> None:
        if self.epochs_are_settled:
            return
        iteration = get_event_storage().iter
        followers = [m for m in self.modules() if hasattr(m, 'set_epoch') and m is not self]
        if self.iterations_per_epoch:
            if iteration % self.iterations_per_epoch == 0:  # a resumed run has the last one in its checkpoint
                for module in followers:
                    module.set_epoch(iteration // self.iterations_per_epoch)
            return
        self.epochs_are_settled = True
        if followers:
            _LOGGER.warning(
                'Nobody tells this detector of epochs, so that the temperature of Dynamic Convolution stays as it is: '
                'set MOE.ITERATIONS_PER_EPOCH (7393 for the 118,287 images of COCO 2017 in batches of 16), or register '
                'moe_zoo.detection.EpochHook.')

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """As the base's: a dictionary of losses in training, else one dictionary an image with its instances."""
        if self.training and torch.is_grad_enabled():
            self._follow_epochs()
        with routing_context(*self._image_sizes(batched_inputs)) as context:
            outputs = super().forward(batched_inputs)
        if not self.training:
            return outputs
        if torch.is_grad_enabled():
            self._refuse_cut_losses(context)
        for name, loss in auxiliary_losses(context.routings).items():
            outputs[f'loss_moe_{name}'] = loss
        self._log(context)
        return outputs

    def _image_sizes(self, batched_inputs: List[Dict[str, Any]]) -> Tuple[torch.Tensor, Tuple[int, int]]:
        """(B, 2) true sizes, and the (height, width) that detectron2's own padding gives the batch."""
        images = ImageList.from_tensors(
            [x['image'][:1] for x in batched_inputs],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        sizes = [torch.stack([torch.as_tensor(side) for side in size]) for size in images.image_sizes]
        return torch.stack(sizes).to(self.device), tuple(images.tensor.shape[-2:])

    def _refuse_cut_losses(self, context: RoutingContext) -> None:
        """Re-entrant checkpointing runs forward without a graph, so that a recorded loss would train nothing."""
        for module, routing in context.records:
            cut = routing.losses and not routing.logits.requires_grad
            deciding = getattr(module, 'router', None) or module  # experts train behind a gate that does not, too
            if cut and any(p.requires_grad for p in deciding.parameters()):
                raise InputError(
                    f'{self._name(module)} runs under re-entrant gradient checkpointing, which cuts its auxiliary loss '
                    'off: checkpoint through moe_zoo.routing.checkpoint_routed.')

    @torch.no_grad()
    def _log(self, context: RoutingContext) -> None:
        storage = get_event_storage()
        if (storage.iter + 1) % LOG_PERIOD:
            return
        for module, routing in context.records:
            name, use = self._name(module), balance(routing)
            storage.put_scalar(f'moe/{name}/cv', use['cv'].item())
            for e, share in enumerate(use['share'].tolist()):
                storage.put_scalar(f'moe/{name}/expert{e}_share', share)

    def _name(self, module: RoutedLayer) -> str:
        return next((name for name, m in self.named_modules() if m is module), type(module).__name__)

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Give a classifier's weights, which detectron2 leaves under names such as `res5.0.conv1.weight` where it finds
        no such parameter, the full name of the routed stage that they belong to; the stage makes experts of them."""
        for name, module in self.named_modules():
            if isinstance(module, (MoEStage, UpcycledStage)):
                own = f'{prefix}{name}.'
                bare = own.rsplit('.', 2)[1] + '.'
                for key in [k for k in state_dict if k.startswith(bare)]:
                    state_dict.setdefault(own + key[len(bare):], state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)


def with_moe_losses(meta_arch: Type[nn.Module]) -> Type[nn.Module]:
    """A meta-architecture of detectron2 whose routed layers are trained by their auxiliary losses too; see `MoELosses`.

    Args:
        meta_arch: Takes a list of dictionaries, returns losses by name in training, and has `backbone` and `device`,
            as RetinaNet, FCOS and GeneralizedRCNN.

    Returns:
        A subclass with the same arguments, for a config, a LazyConfig or a call.
    """
    return type(f'MoE{meta_arch.__name__}', (MoELosses, meta_arch), {'__doc__': MoELosses.__doc__})


@META_ARCH_REGISTRY.register()
class MoERetinaNet(with_moe_losses(RetinaNet)):
    """detectron2's RetinaNet with auxiliary losses; from a config, with the experts in the head that MOE.HEAD asks for.

    Args:
        train_only_new: Freeze all but the experts and gates of the head.
        kwargs: As in RetinaNet.
    """

    @configurable
    def __init__(self, *, train_only_new: bool = False, **kwargs):
        super().__init__(**kwargs)
        if train_only_new:
            train_experts_only(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        arguments = super().from_config(cfg)
        if cfg.MOE.HEAD.SUBNETS != 'none':
            shapes = arguments['backbone'].output_shape()
            arguments['head'] = MoERetinaNetHead(cfg, [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES])
        return {
            **arguments,
            'train_only_new': cfg.MOE.HEAD.TRAIN_ONLY_NEW,
            'iterations_per_epoch': cfg.MOE.ITERATIONS_PER_EPOCH,
        }


@META_ARCH_REGISTRY.register()
class MoEGeneralizedRCNN(with_moe_losses(GeneralizedRCNN)):
    """detectron2's Faster and Mask R-CNN with auxiliary losses."""


@META_ARCH_REGISTRY.register()
class MoEFCOS(with_moe_losses(FCOS)):
    """detectron2's FCOS with auxiliary losses, in a LazyConfig: detectron2 builds none from yaml."""

    def __init__(self, *args, **kwargs):
        if args:
            raise InputError('MODEL.META_ARCHITECTURE MoEFCOS: detectron2 has FCOS in LazyConfigs only; run one by '
                             'moe-zoo run lazyconfig_train_net.py, or use MoERetinaNet.')
        super().__init__(**kwargs)


class EpochHook(HookBase):
    """Tell the model of epochs, which detectron2 does not count: the temperature of Dynamic Convolution follows them.

    Args:
        iterations: Iterations an epoch: images of the training set by images a batch.
    """

    def __init__(self, iterations: float):
        self.iterations = iterations
        self.epoch = -1

    def before_step(self) -> None:
        epoch = math.floor(self.trainer.iter / self.iterations)
        if epoch != self.epoch:
            set_epoch(self.trainer.model, epoch)
            self.epoch = epoch
