"""timm's classification task with the auxiliary losses of routed models added once, inside the returned loss.

Distribution, compilation, EMA, accumulation and checkpoint state are inherited. The task works in timm's train.py too
(`moe-zoo run train.py`), which divides, scales and differentiates `result['loss']` and nothing else.
Letters: B images, E experts.
"""
import gc
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..losses import auxiliary_losses, balance
from ..routing import Routing, end_step_after_optimizer, set_epoch, trace_routing
from .epochs import set_epoch_after_schedule


class MoEClassificationTask(ClassificationTask):
    """Classification loss plus the auxiliary losses that the routed layers ask for.

    A model without routed layers trains exactly as under timm's task. Arguments are those of timm's
    `ClassificationTask`; the model's `set_aux_loss(True)` is called before anything wraps it. Routers that adapt
    between steps (a selection bias moved against the load) are told of every step of an optimiser that holds the
    model's parameters.

    Args:
        balance_over_ranks: Take the statistics of the auxiliary losses over the batches of all ranks, as
            `moe_zoo.losses.auxiliary_losses(over_ranks=True)`.
    """

    def __init__(self, model: nn.Module, *args, balance_over_ranks: bool = False, **kwargs):
        super().__init__(model, *args, **kwargs)
        if hasattr(unwrap_model(model), 'set_aux_loss'):
            unwrap_model(model).set_aux_loss(True)
        self.balance_over_ranks = balance_over_ranks
        self._layers: List[str] = []
        end_step_after_optimizer(unwrap_model(model))
        set_epoch_after_schedule(self)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'MoEClassificationTask':
        """As timm's, for a model that FSDP2 has not; on CPU, DDP refuses `device_ids`, which timm's train.py passes
        always."""
        from .parallel import is_sharded
        if is_sharded(self.trainable_module):
            return self
        self._distributed = dict(ddp_kwargs, device_ids=device_ids)
        return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

    def freeze_gates(self) -> None:
        """Freeze the gates of a DeepMoE model (`DeepMoEModel.freeze_gates`), between two steps; on every rank."""
        self._change(lambda model: model.freeze_gates())

    def set_epoch(self, epoch: int) -> None:
        """`moe_zoo.routing.set_epoch`, between two steps; on every rank. What trains may change (separate pMoE)."""
        self._change(lambda model: set_epoch(model, epoch))

    def _change(self, change: Callable[[nn.Module], None]) -> None:
        """Change a model that may be inside DistributedDataParallel.

        That waits for the gradients of the parameters that had one when it was made: if these become others, the model
        is wrapped anew.

        Raises:
            InputError: The model is sharded by FSDP2.
        """
        model = unwrap_model(self.trainable_module)
        before = [p.requires_grad for p in model.parameters()]
        change(model)
        if before == [p.requires_grad for p in model.parameters()]:
            return
        from .parallel import is_sharded
        if is_sharded(model):
            raise InputError(
                'What the model trains changes with the epoch, which parallel=fsdp cannot follow: use parallel=ddp.')
        if isinstance(self.trainable_module, DistributedDataParallel):
            self.trainable_module = self.trainable_module.module
            gc.collect()  # the old wrapper's hooks go with it
            self.prepare_distributed(**self._distributed)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """One forward through the model and all losses.

        Args:
            input: (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.

        Returns:
            loss: Task loss plus auxiliary losses, to differentiate.
            output: (B, classes) logits.
            task_loss, loss_NAME: What `loss` is the sum of, detached, for logs.
            balance: Layer name to `moe_zoo.losses.balance` of its records; empty for a model without routed layers.
        """
        output, routings = self.run(input)
        return self.add_up(output, target, routings, self.auxiliary_losses(routings, target))

    def auxiliary_losses(self, routings: List[Routing], target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """`moe_zoo.losses.auxiliary_losses`, of this rank or of all."""
        return auxiliary_losses(routings, target, self.balance_over_ranks)

    def run(self, input: torch.Tensor) -> Tuple[torch.Tensor, List[Routing]]:
        """The model's output, and in training the records of its routed layers."""
        output = self.trainable_module(input)
        if not (isinstance(output, tuple) and self.training):
            return output, []
        if not self._layers and not torch.compiler.is_compiling():
            self._layers = self._name_layers(input)
        return output

    def add_up(
            self,
            output: torch.Tensor,
            target: torch.Tensor,
            routings: List[Routing],
            auxiliary: Dict[str, torch.Tensor],
    ) -> Dict[str, Any]:
        """The result of a forward whose auxiliary losses are known, by name."""
        task_loss = self.criterion(output, target)
        return {
            'loss': sum(auxiliary.values(), task_loss),
            'output': output,
            'task_loss': task_loss.detach(),
            **{f'loss_{name}': value.detach() for name, value in auxiliary.items()},
            'balance': {name: balance(routing) for name, routing in zip(self._layers, routings)},
        }

    @torch.no_grad()
    def _name_layers(self, input: torch.Tensor) -> List[str]:
        """Names of the routed layers in the order of their records: one forward in evaluation, which draws nothing."""
        model = unwrap_model(self.trainable_module)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        with trace_routing(model) as trace, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # checkpointing complains where there is no gradient
            model(input)
        for module, training in modes:
            module.training = training
        return [name for name, records in trace.items() for _ in records] or ['']


class MoEMultiLabelClassificationTask(MultiLabelClassificationTask, MoEClassificationTask):
    """Independent binary targets, with auxiliary losses."""
