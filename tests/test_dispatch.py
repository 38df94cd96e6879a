"""The fast dispatchers are held to the reference, and capacity to a plain loop.

Letters: T tokens, D width, E experts, K chosen experts, S tokens a group, C slots.
"""
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_zoo.layers import moe_mlp
from moe_zoo.layers.moe_mlp import MoEMlp
from moe_zoo.routing import Routing, dispatch_padded, dispatch_reference, dispatch_sorted, routing_context
from moe_zoo.routing.capacity import compute_capacity


def doubling(chunks):
    """Expert e multiplies by e + 2; the empty chunks have no output."""
    return [chunk * (e + 2) for e, chunk in enumerate(chunks) if len(chunk)]


def doubling_stacked(x):
    return x * torch.arange(2, 2 + len(x), dtype=x.dtype).view(-1, 1, 1)


def small_record(kept=None):
    """Three tokens, two experts, both chosen in different order."""
    return Routing(
        logits=torch.zeros(3, 2),
        gates=torch.full((3, 2), 0.5),
        weights=torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]),
        indices=torch.tensor([[0, 1], [1, 0], [1, 0]]),
        kept=kept,
    )


@pytest.mark.parametrize('dispatch', ['reference', 'sorted', 'padded'])
def test_three_tokens_by_hand(dispatch):
    x = torch.tensor([[1.], [2.], [4.]])
    run = {
        'reference': lambda routing: dispatch_reference(x, routing, doubling),
        'sorted': lambda routing: dispatch_sorted(x, routing, doubling),
        'padded': lambda routing: dispatch_padded(x, routing, doubling_stacked, capacity=3),
    }[dispatch]
    # Expert 0 doubles and expert 1 trebles: 1 (.75*2 + .25*3) = 2.25; 2 (.5*3 + .5*2) = 5; 4 (1*3 + 0*2) = 12.
    assert run(small_record()).flatten().tolist() == [2.25, 5., 12.]
    # Token 0 loses its second choice: 1.5. Token 1 loses both: 0. The weights of the rest do not change.
    kept = torch.tensor([[True, False], [False, False], [True, True]])
    assert run(small_record(kept)).flatten().tolist() == [1.5, 0., 12.]


def test_sorted_leaves_idle_experts_out():
    """Expert 0 gets nothing: its chunk is empty and never reaches the arithmetic."""
    record = Routing(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1), torch.tensor([[2], [1]]))
    seen = []

    def run(chunks):
        seen.extend(len(chunk) for chunk in chunks)
        return doubling(chunks)
    assert dispatch_sorted(torch.ones(2, 1), record, run).flatten().tolist() == [4., 3.]
    assert seen == [0, 1, 1]


def test_weights_stay_float32_beside_bfloat16_experts():
    """0.7 is not a bfloat16 number: rounding the weight first would give 0.69921875 * 256 = 179."""
    record = Routing(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[0.7]]), torch.tensor([[0]]))
    x = torch.tensor([[256.]])

    def run(chunks):
        return [chunk.bfloat16() for chunk in chunks]
    for dispatch in (dispatch_sorted, dispatch_reference):
        assert dispatch(x, record, run).item() == pytest.approx(179.2, abs=1e-4)
    padded = dispatch_padded(x, record, lambda buffer: buffer.bfloat16(), capacity=1)
    assert padded.dtype == torch.float32 and padded.item() == pytest.approx(179.2, abs=1e-4)


def slots_by_loop(indices, priority, group_size, capacity, batch_priority):
    """(T, K) kept pairs, written out: all first choices of a group in order, then all second ones."""
    kept = torch.zeros_like(indices, dtype=torch.bool)
    for start in range(0, len(indices), group_size):
        tokens = list(range(start, min(start + group_size, len(indices))))
        slots = capacity(len(tokens))
        if batch_priority:
            tokens.sort(key=lambda t: -priority[t].item())  # Python's sort is stable
        used = {}
        for k, t in itertools.product(range(indices.shape[1]), tokens):
            expert = indices[t, k].item()
            used[expert] = used.get(expert, 0) + 1
            kept[t, k] = used[expert] <= slots
    return kept


SWEEP = [
    # experts, selected, factor, batch priority, images of 5 tokens (groups of 3 images: 7 leave a last group of 1)
    (4, 1, 1.05, False, 7),
    (4, 2, 0.5, True, 7),
    (4, 2, 0.5, False, 6),
    (8, 2, 1.0, True, 4),
    (8, 3, 0.3, False, 2),
    (3, 3, 0.7, True, 5),
    (4, 4, None, False, 3),
    (16, 2, None, False, 7),
    (1, 1, 0.5, True, 4),
]


@pytest.mark.parametrize('num_experts, num_selected, factor, priority, images', SWEEP)
def test_fast_paths_equal_the_reference(monkeypatch, num_experts, num_selected, factor, priority, images):
    """Values, and gradients of the input and of every parameter, router included."""
    layer = MoEMlp(
        12, 20, num_experts=num_experts, num_selected=num_selected, capacity_factor=factor, batch_priority=priority,
        group_images=3, capacity_multiple_of=1, same_init=False)
    x = torch.randn(images, 5, 12)
    noise = torch.randn(images * 5, num_experts)
    layer.router.sample_noise = lambda logits: noise
    mixer = torch.randn(images, 5, 12)  # so that every output element has its own gradient

    def run():
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with routing_context() as context:
            y = layer(inputs)
        (y * mixer).sum().backward()
        return y.detach(), inputs.grad, {n: p.grad for n, p in layer.named_parameters()}, context.routings[0]

    fast = run()
    monkeypatch.setattr(moe_mlp, 'wants_static_shapes', lambda x: True)
    static = run()
    monkeypatch.setattr(moe_mlp, 'dispatch_padded', lambda x, routing, *_: dispatch_reference(
        x, routing, layer.run_experts))
    reference = run()

    for name, got in (('sorted', fast), ('padded', static)):
        torch.testing.assert_close(got[0], reference[0], rtol=1e-5, atol=1e-6, msg=f'{name} output')
        torch.testing.assert_close(got[1], reference[1], rtol=1e-4, atol=1e-6, msg=f'{name} input gradient')
        for key, gradient in reference[2].items():
            torch.testing.assert_close(got[2][key], gradient, rtol=1e-4, atol=1e-6, msg=f'{name} gradient of {key}')

    record = fast[3]
    if factor is None:
        assert record.kept is None
    else:
        def capacity(size):
            return compute_capacity(size, num_experts, num_selected, factor, multiple_of=1)
        expected = slots_by_loop(record.indices, record.weights.amax(-1), 15, capacity, priority)
        assert torch.equal(record.kept, expected)
        assert factor > 1 or not record.kept.all()  # or this would compare nothing but permutations
        dropped = ~record.kept.any(dim=1)
        assert (fast[0].flatten(0, 1)[dropped] == 0).all()


def test_a_last_group_has_its_own_capacity():
    """Ten images in groups of 8: 16 tokens with 8 slots, then 4 tokens with 2; all tokens want expert 0."""
    layer = MoEMlp(
        4, num_experts=2, num_selected=1, capacity_factor=1.0, capacity_multiple_of=1, noise_std=0., same_init=False)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1., 0, 0, 0], [0, 0, 0, 0]]))
    with routing_context() as context:
        layer(torch.ones(10, 2, 4))
    record = context.routings[0]
    assert record.group_size == 16 and record.shape == (10, 2)
    # ceil(16 * 1 * 1.0 / 2) = 8 slots for the first 16 tokens; ceil(4 / 2) = 2 for the last 4: first come.
    assert record.kept.flatten().tolist() == [True] * 8 + [False] * 8 + [True] * 2 + [False] * 2


def test_batch_priority_serves_the_surest_first():
    """Four tokens want expert 0, which has two slots: by position tokens 0 and 1, by gate tokens 3 and 1."""
    x = torch.tensor([[1.], [3.], [2.], [4.]]).view(4, 1, 1)
    kept = {}
    for priority in (False, True):
        layer = MoEMlp(
            1, 4, num_experts=2, num_selected=1, capacity=2, batch_priority=priority, noise_std=0., same_init=False)
        with torch.no_grad():
            layer.router.weight.copy_(torch.tensor([[1.], [0.]]))  # logits (x, 0): the larger x, the surer
        with routing_context() as context:
            layer(x)
        kept[priority] = context.routings[0].kept.flatten().tolist()
    assert kept[False] == [True, True, False, False]
    assert kept[True] == [False, True, False, True]


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    layer = MoEMlp(4, 8, num_experts=2)
    y = layer(torch.zeros(0, 3, 4))
    assert y.shape == (0, 3, 4)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in (layer.fc1.weight, layer.fc2.bias))


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations take while it is entered: `now`, and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}  # of which a view takes nothing
        for storage in _storages(out):
            pointer = storage.data_ptr()
            if storage.nbytes() and pointer not in given and pointer not in self.sizes:
                self.sizes[pointer] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, pointer)
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self):
        return sum(self.sizes.values())


def _storages(tree):
    return [tensor.untyped_storage() for tensor in tree_leaves(tree) if isinstance(tensor, torch.Tensor)]


def chosen_by_tokens(items, num_experts, num_selected):
    indices = torch.rand(items, num_experts).argsort(dim=1)[:, :num_selected]
    logits = torch.zeros(items, num_experts)
    return Routing(logits, logits, torch.rand(items, num_selected, requires_grad=True), indices)


def chosen_by_experts(items, num_experts, num_selected):
    """Every expert has K / E of the tokens, as in Expert Choice at capacity factor 1."""
    logits = torch.zeros(items, num_experts)
    indices = torch.arange(num_experts).expand(items, -1)
    kept = torch.rand(items, num_experts).argsort(dim=0) < items * num_selected // num_experts
    return Routing(logits, logits, torch.rand(items, num_experts), indices, kept, by_expert=True)


@pytest.mark.parametrize('num_selected', [1, 2, 4])
@pytest.mark.parametrize('choose, static', [
    (chosen_by_tokens, False), (chosen_by_experts, False), (chosen_by_experts, True)])
def test_memory_is_that_of_2k_plus_1_copies_of_the_tokens(choose, static, num_selected):
    """Rows that experts get, rows that they return, and the sum; indices and products of one chunk are within it."""
    x = torch.randn(512, 256)
    record = choose(512, 8, num_selected)
    weight = torch.randn(256, 256)
    with torch.no_grad(), LiveBytes() as memory:
        if static:
            y = dispatch_padded(x, record, lambda rows: rows @ weight, capacity=512 * num_selected // 8)
        else:
            y = dispatch_sorted(x, record, lambda chunks: [chunk @ weight for chunk in chunks])
    assert memory.now == y.nbytes == x.nbytes  # nothing else is left
    assert 2 * num_selected * x.nbytes < memory.peak <= (2 * num_selected + 1) * x.nbytes


@pytest.mark.parametrize('num_selected', [1, 2, 4])
def test_backward_keeps_2k_copies_of_the_tokens(num_selected):
    """Rows that experts got, for the gradients of their weights; rows that they returned, for those of the gates."""
    x = torch.randn(512, 256, requires_grad=True)
    record = chosen_by_tokens(512, 8, num_selected)
    weight = torch.randn(256, 256, requires_grad=True)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = dispatch_sorted(x, record, lambda chunks: [chunk @ weight for chunk in chunks])
    for tensor in (x, weight, record.indices):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert 2 * num_selected * x.nbytes <= sum(saved.values()) < (2 * num_selected + 0.5) * x.nbytes
    y.sum().backward()
    assert x.grad.abs().min() > 0
