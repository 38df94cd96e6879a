"""One model on many processes: experts spread over ranks, parameters sharded by FSDP2, one state dict for all of it.

Three ways, of which the last goes with either of the others:

- DistributedDataParallel, timm's and the default: every rank holds the whole model.
- `shard_model`: FSDP2 (`torch.distributed.fsdp.fully_shard`); every rank holds its part of every parameter, and of the
  optimiser's state, and gathers a block's when the block runs.
- `parallelize_experts`: every rank holds some of the experts of `MoEMlp` and `SoftMoEMlp`, and tokens travel to them.

All ranks see images of their own; what is computed is what one process would compute of all of them. Groups of tokens,
which capacity and balance losses count in, are made of the images of a rank and never span two: as in one process,
where the batch of a rank is a multiple of the group.

A state dict of a spread model has the names and the global shapes of the plain one, as DTensors. `whole` gathers it,
and a plain one can be loaded into a spread model; `save_sharded` and `load_sharded` write and read it in parts.

Letters: E experts, R ranks.
"""
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from ..checkpoints.parts import PlainPlanner, PlainReader
from ..errors import InputError
from ..layers.expert_mlps import ExpertLinear, ExpertMlps
from ..routing import ExpertExchange

# ---- spreading


def create_mesh(expert_parallel: int = 1, device_type: str = 'cpu') -> DeviceMesh:
    """All ranks as a grid (data, expert): those of a row hold the experts between them, those of a column the same.

    >>> create_mesh(2)  # of 4 ranks: 0 and 1 hold one half of the experts each, 2 and 3 the same halves

    Raises:
        InputError: `expert_parallel` does not divide the number of ranks.
    """
    ranks = dist.get_world_size()
    if expert_parallel < 1 or ranks % expert_parallel:
        raise InputError(
            f'expert_parallel={expert_parallel} does not divide the {ranks} processes: use a divisor of their number.')
    return init_device_mesh(device_type, (ranks // expert_parallel, expert_parallel), mesh_dim_names=('data', 'expert'))


class SpreadExpertLinear(ExpertLinear):
    """The maps of E / R of the E experts. Parameters are DTensors of all E; what is computed with is the local part.

    Args:
        whole: All E maps, alike on all ranks.
        mesh: (data, expert), see `create_mesh`.
    """

    def __init__(self, whole: ExpertLinear, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.num_experts = whole.num_experts // mesh['expert'].size()
        self.same_init = whole.same_init
        self.ranks = mesh.size()
        for name in ('weight', 'bias'):
            parameter = getattr(whole, name)
            if parameter is not None:
                spread = distribute_tensor(parameter.detach(), mesh, (Replicate(), Shard(0)), src_data_rank=None)
                parameter = nn.Parameter(spread, requires_grad=parameter.requires_grad)
            setattr(self, name, parameter)

    def _local(self, parameter: nn.Parameter) -> torch.Tensor:
        """The part of this rank. Its gradient is summed over the ranks that hold the same part, and is that of the mean
        loss of all ranks: an expert works for the images of several."""
        local = parameter.redistribute(placements=parameter.placements)  # whose backward sums over `data`
        local = local.to_local(grad_placements=(Partial(), Shard(0)))
        if local.requires_grad:
            local.register_hook(lambda grad: grad / self.ranks)
        return local

    def local(self) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        return self._local(self.weight), None if self.bias is None else self._local(self.bias)


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the experts of every `MoEMlp` and `SoftMoEMlp` over the ranks of a row of the mesh, in place.

    Everything else stays on all ranks: wrap the model in DistributedDataParallel, which leaves the experts alone, or
    give it to `shard_model`, before the optimiser is made. Weights are those of rank 0.

    Args:
        model: On its device.
        mesh: (data, expert), see `create_mesh`.

    Returns:
        The model.

    Raises:
        InputError: There is no such layer, or it has a number of experts that the ranks of a row do not divide.
    """
    ranks = mesh['expert'].size()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpertMlps)}
    if not layers:
        raise InputError(
            f'expert_parallel={ranks}: {type(model).__name__} has no experts that can be spread, which are those of'
            ' MoEMlp and SoftMoEMlp; leave it out, or use parallel=fsdp.')
    for name, layer in layers.items():
        if layer.num_experts % ranks:
            raise InputError(
                f'expert_parallel={ranks} does not divide the {layer.num_experts} experts of {name or "the layer"}: use'
                ' a divisor.')
    send_from_first_rank(model)
    for layer in layers.values():
        layer.fc1, layer.fc2 = SpreadExpertLinear(layer.fc1, mesh), SpreadExpertLinear(layer.fc2, mesh)
        layer.exchange = ExpertExchange(mesh.get_group('expert'))
    experts = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    return _accept_plain_weights(model)


def shard_model(model: nn.Module, mesh: Optional[DeviceMesh] = None) -> nn.Module:
    """Shard a model of any family by FSDP2, in place: block by block, as far as it has lists of blocks.

    Buffers, running statistics and counters among them, stay whole on every rank. Weights are those of rank 0. Make the
    optimiser afterwards.

    Args:
        model: On its device; experts may have been spread by `parallelize_experts`, which then stay as they are.
        mesh: Of all ranks; None makes one.

    Returns:
        The model.
    """
    spread = {p for p in model.parameters() if isinstance(p, DTensor)}
    device = next(p for p in model.parameters() if p not in spread).device.type
    send_from_first_rank(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),)) if mesh is None else mesh
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=spread)
    fully_shard(model, mesh=mesh, ignored_params=spread)
    return _accept_plain_weights(model)


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The members of the lists of a model, one level into lists of lists."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for member in child:
                yield from member if isinstance(member, (nn.Sequential, nn.ModuleList)) else [member]


@torch.no_grad()
def send_from_first_rank(model: nn.Module) -> None:
    """Parameters and buffers of rank 0 to all others, where they are not spread already."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and tensor.numel():
            dist.broadcast(tensor.data, 0)


# ---- gradients


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has the model."""
    return isinstance(model, FSDPModule)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters that are whole, sharded and spread, by their norm together.

    Returns:
        The norm before, alike on every rank.
    """
    by_mesh: Dict[Any, List[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    norms = [_whole(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, most, norm)
    return norm


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is finite, on all ranks that hold parts of it."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    finite = torch.stack([part.isfinite().all() for part in parts]).all()
    if dist.is_available() and dist.is_initialized():
        finite = finite.to(torch.uint8)
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


# ---- states: in one piece


def whole(state: Any) -> Any:
    """A state dict, of a model or an optimiser, with every spread tensor gathered on the CPU. Every rank calls it."""
    return tree_map(lambda leaf: _whole(leaf).cpu() if isinstance(leaf, DTensor) else leaf, state)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread_like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor, that every rank has, spread as `own` is."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _accept_plain_weights(model: nn.Module) -> nn.Module:
    """Let `load_state_dict` of a spread model take the weights of a plain one."""
    if not getattr(model, '_accepts_plain_weights', False):
        def spread(module: nn.Module, state: Dict[str, Any], prefix: str, *_: Any) -> None:
            for name, own in module.named_parameters():
                if prefix + name in state:
                    state[prefix + name] = _spread_like(state[prefix + name], own)
        model.register_load_state_dict_pre_hook(spread)
        model._accepts_plain_weights = True
    return model


def spread_optimizer_state(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> Dict[str, Any]:
    """The state dict of a plain optimiser, for one whose parameters are spread; tensors of a parameter's shape follow
    that parameter."""
    own = [p for group in optimizer.param_groups for p in group['params']]
    names = [name for group in state['param_groups'] for name in group['params']]
    parameters = dict(zip(names, own))
    moved = {
        name: {key: _spread_like(value, parameters[name]) if isinstance(value, torch.Tensor) else value
               for key, value in entry.items()}
        for name, entry in state['state'].items()}
    return {**state, 'state': moved}


# ---- states: in parts


def save_sharded(
        folder: Union[str, Path],
        model: nn.Module,
        optimizer: Optional[torch.optim.Optimizer] = None,
) -> None:
    """Write the parts of a model and its optimiser, every rank its own, by torch.distributed.checkpoint.

    Every rank calls it. Wrappers leave no trace in the names.
    """
    dcp.save(_state(model, optimizer), checkpoint_id=str(folder))


def load_sharded(
        folder: Union[str, Path],
        model: nn.Module,
        optimizer: Optional[torch.optim.Optimizer] = None,
) -> None:
    """Read what `save_sharded` wrote, on any number of ranks, spread in any of these ways or not at all.

    Nothing in the folder is run: see `moe_zoo.checkpoints.parts`.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it is of another model.
    """
    reader = PlainReader(folder)
    state = _state(model, optimizer)
    try:
        dcp.load(state, storage_reader=reader, planner=PlainPlanner())
    except dcp.CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise InputError(f"'{folder}' does not fit the model: {' '.join(str(first).split())[:300]}") from error
    set_model_state_dict(model, state['model'])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state['optimizer'])


def _state(model: nn.Module, optimizer: Optional[torch.optim.Optimizer]) -> Dict[str, Any]:
    state = {'model': get_model_state_dict(model)}
    if optimizer is not None:
        state['optimizer'] = get_optimizer_state_dict(model, optimizer)
    return state


# ---- options of a run


def check_options(args: Any) -> None:
    """Raises: InputError: An option does not go with a spread model, or there are no processes to spread it over."""
    asked = f'expert_parallel={args.expert_parallel}' if args.expert_parallel > 1 else 'parallel=fsdp'
    if not args.distributed:
        raise InputError(
            f'{asked} needs several processes: torchrun --nproc_per_node=N tools/train_imagenet.py ...')
    for unfit, option, reason in (
            (args.model_ema, 'model_ema=true', 'the average is kept of a whole model'),
            (args.torchcompile, f'torchcompile={args.torchcompile}', 'how many tokens travel shows at run time only'),
            (args.amp and args.amp_dtype == 'float16' and args.device != 'cpu', 'amp_dtype=float16',
             'its loss scaler sees the gradients of one rank; use amp_dtype=bfloat16'),
            (args.clip_grad is not None and args.clip_mode != 'norm', f'clip_mode={args.clip_mode}',
             'use clip_mode=norm'),
            (args.parallel == 'fsdp' and args.freeze_gates is not None, f'freeze_gates={args.freeze_gates}',
             'what is sharded cannot be frozen between two epochs'),
    ):
        if unfit:
            raise InputError(f'{asked} does not go with {option}: {reason}.')


def spread(args: Any, model: nn.Module, device: torch.device) -> nn.Module:
    """Spread a model as the options of a run ask for.

    Raises:
        InputError: See `check_options`, `create_mesh` and `parallelize_experts`.
    """
    check_options(args)
    if args.expert_parallel > 1:
        parallelize_experts(model, create_mesh(args.expert_parallel, device.type))
    # FSDP2 warns of a view among the outputs, and records are full of them: nobody changes those in place.
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module')
    return shard_model(model) if args.parallel == 'fsdp' else model
