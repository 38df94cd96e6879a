"""torch.compile: one graph for every family, in evaluation and training, equal to the model as it is."""
import copy

import pytest
import torch
import torch._inductor.config
from graph_cases import CASES, batch, build
from torch import nn

from moe_zoo.layers.moe_stage import MoEStage
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import end_step, routing_context, trace_routing

FAST = ('vmoe', 'pmoe_cnn')


def step(model: nn.Module, run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a training step makes: logits, losses, gradients, buffers."""
    state = copy.deepcopy(model.state_dict())
    model.zero_grad()
    torch.manual_seed(1)  # of noise, dropout and stochastic depth
    logits, routings = run(x)
    losses = auxiliary_losses(routings, torch.arange(len(x)))
    (logits.square().mean() + sum(losses.values())).backward()
    end_step(model)
    found = {'logits': logits.detach(), **{f'loss {name}': loss.detach() for name, loss in losses.items()}}
    found.update({f'gradient of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None})
    found.update({name: b.clone() for name, b in model.named_buffers() if not name.endswith('num_batches_tracked')})
    model.load_state_dict(state)
    return found


def check_compiled(case: str, backend: str) -> None:
    torch._dynamo.reset()
    # Rounding, which differs in another layout, grows from layer to layer of a mobile network with random weights.
    dtype = torch.float64 if case == 'condconv_mobile' else torch.float32
    model, x = build(case).to(dtype), batch(case, 4).to(dtype)
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break in the graph is an error
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train().set_aux_loss(True)
    wanted, found = step(model, model, x), step(model, compiled, x)
    assert found.keys() == wanted.keys() and any(name.startswith('gradient') for name in wanted)
    for name, value in wanted.items():
        # A graph computes in contiguous memory, eager batches in channels-last: sums are rounded differently.
        small = 1e-5 + 1e-4 * float(value.abs().max()) if value.is_floating_point() else 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=small, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('case', [
    case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_one_graph_equals_the_model_in_evaluation_and_training(case):
    check_compiled(case, 'eager')


@pytest.mark.slow
def test_inductor_computes_the_same(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, 'fallback_random', True)  # the noise of the eager model
    check_compiled('vmoe', 'inductor')


def test_records_leave_a_compiled_model_for_every_context():
    torch._dynamo.reset()
    model, x = build('vmoe'), batch('vmoe', 3)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    with torch.no_grad():
        compiled(x)  # before anybody listens
        for _ in range(4):
            with trace_routing(model) as trace, routing_context() as context:
                compiled(x)
        with trace_routing(model) as wanted:
            model(x)
    assert list(trace) == ['blocks.1.mlp'] and len(context.records) == 1
    assert context.records[0][0] is model.blocks[1].mlp
    for found in (trace['blocks.1.mlp'][0], context.routings[0]):
        torch.testing.assert_close(found.weights, wanted['blocks.1.mlp'][0].weights)
        assert torch.equal(found.indices, wanted['blocks.1.mlp'][0].indices)
    assert len(graphs) == 2  # without a listener, and with: not one more for every context


@pytest.mark.parametrize('images', [(0, 0, 1, 0), (2, 2, 2, 2), (0, 1, 2, 2)])
@pytest.mark.parametrize('size', [1, 3])
def test_statistics_of_experts_are_those_of_their_images(images, size):
    """Also where an expert has no image, and where it has one value a channel, which is no statistic."""
    experts = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()) for _ in range(3)]
    stage = MoEStage(experts, 3, num_selected=1, noise=False).double().train()
    with torch.no_grad():
        stage.router.weight.copy_(torch.eye(3))
    x = torch.randn(4, 3, size, size, dtype=torch.float64) / 9
    for b, expert in enumerate(images):
        x[b, expert] += 1
    found = []
    for combine in (stage.combine_sparse, stage.combine_reference):
        state = copy.deepcopy(stage.state_dict())
        stage.zero_grad()
        y = combine(x, stage.route(x))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), *(p.grad for p in stage.parameters()), *(
            b.clone() for name, b in stage.named_buffers() if not name.endswith('tracked'))])
        stage.load_state_dict(state)
    for sparse, static in zip(*found):
        torch.testing.assert_close(static, sparse, rtol=1e-6, atol=1e-6)  # the weights of a router are float32
