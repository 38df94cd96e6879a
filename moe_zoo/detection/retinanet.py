"""RetinaNet whose backbone may hold routed layers: the outermost forward, which collects their records."""
from typing import Any, Dict, List, Tuple

import torch
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage

from ..errors import InputError
from ..layers import RoutedLayer
from ..layers.moe_stage import MoEStage
from ..losses import auxiliary_losses, balance
from ..routing import RoutingContext, end_step_after_optimizer, routing_context

LOG_PERIOD = 20  # iterations; detectron2's writers have the same period


@META_ARCH_REGISTRY.register()
class MoERetinaNet(RetinaNet):
    """detectron2's RetinaNet, which opens one routing context for one forward.

    The context carries the true sizes of the padded images to the gates and collects what the routers decide. In
    training every auxiliary loss that a layer asks for enters the loss dictionary as `loss_moe_<name>`, and, every 20
    iterations, the share of each expert goes to the event storage as `moe/<layer>/expert<e>_share` with its coefficient
    of variation `moe/<layer>/cv`: never into the dictionary, whose every entry detectron2 adds to the loss. Nothing is
    left on the module.

    Routers that adapt between steps (hard constraints, a selection bias) are told of every step of an optimiser of the
    model, whichever trainer takes it.

    Statistics of a distributed run are those of one rank's images.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        end_step_after_optimizer(self)

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """As detectron2's: a dictionary of losses in training, else one dictionary an image with its instances."""
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
            if cut and any(p.requires_grad for p in module.parameters()):
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
            if isinstance(module, MoEStage):
                own = f'{prefix}{name}.'
                bare = own.rsplit('.', 2)[1] + '.'
                for key in [k for k in state_dict if k.startswith(bare)]:
                    state_dict.setdefault(own + key[len(bare):], state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)
