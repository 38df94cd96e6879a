"""The image-level routed stage: sparse path against reference, empty experts, single-value BatchNorm, dense weights."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_zoo.errors import InputError
from moe_zoo.layers.image_moe import GATES
from moe_zoo.layers.moe_stage import MoEStage, perturbed
from moe_zoo.layers.routed import batch_norm_of_images
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import routing_context, trace_routing


def conv_experts(num, norm=None, stride=2):
    norm = norm or (lambda c: nn.GroupNorm(2, c))
    return [nn.Sequential(nn.Conv2d(4, 6, 3, stride, 1), norm(6), nn.ReLU()) for _ in range(num)]


def choose(stage, image_expert):
    """Make the gate of image b prefer the experts image_expert[b], best first: channel c of an image is its logit c."""
    with torch.no_grad():
        stage.router.weight.copy_(torch.eye(stage.num_experts, stage.in_chs))
    maps = torch.zeros(len(image_expert), stage.in_chs, 8, 8)
    for b, experts in enumerate(image_expert):
        for rank, e in enumerate(experts):
            maps[b, e] = 4. - rank
    return maps


@pytest.mark.parametrize('selected', [1, 2, 3])
@pytest.mark.parametrize('noise', [False, True])
def test_sparse_path_equals_reference_in_values_and_gradients(selected, noise):
    torch.manual_seed(0)
    stage = MoEStage(conv_experts(3), 4, num_selected=selected, noise=noise).double()
    nn.init.normal_(stage.router.weight)
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for combine in (stage.combine_sparse, stage.combine_reference):
        stage.zero_grad()
        torch.manual_seed(1)
        routing = stage.router(x.mean(dim=(2, 3)))
        y = combine(x, routing)
        grads.append([y.detach()])
        grads[-1] += torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(),
                                         [x, *stage.parameters()], allow_unused=True)
    assert grads[0][0].shape == (5, 6, 4, 4)
    for sparse, reference in zip(*grads):
        if reference is not None:  # the noise matrix is zero-initialised but used; without noise it does not exist
            torch.testing.assert_close(sparse, reference, rtol=1e-6, atol=1e-6)


def test_only_chosen_experts_run_and_only_on_their_images():
    stage = MoEStage(conv_experts(4), 4, num_selected=1).eval()
    x = choose(stage, [[2], [0], [2]])
    seen = {}
    for e, expert in enumerate(stage.experts):
        expert.register_forward_hook(lambda m, i, o, e=e: seen.setdefault(e, []).append(i[0].shape[0]))
    y = stage(x)
    assert seen == {2: [2], 0: [1]}  # images 0 and 2 together; experts 1 and 3 never
    torch.testing.assert_close(y[1:2], stage.experts[0](x[1:2]))  # one expert: its weight is 1


def test_idle_expert_gets_zero_gradients_without_running_even_when_its_weights_are_infinite():
    stage = MoEStage(conv_experts(3, nn.BatchNorm2d), 4, num_selected=1).train()
    x = choose(stage, [[0], [0]])
    stage.router.sample_noise = torch.zeros_like
    with torch.no_grad():
        stage.experts[1][0].weight.fill_(math.inf)
    stage(x).square().sum().backward()
    assert all(p.grad is not None for p in stage.parameters())
    assert all(p.grad.count_nonzero() == 0 for e in (1, 2) for p in stage.experts[e].parameters())
    assert stage.experts[0][0].weight.grad.count_nonzero() > 0
    assert stage.experts[2][1].num_batches_tracked == 0 and stage.experts[0][1].num_batches_tracked == 1


def test_batch_norm_on_one_single_value_map_uses_running_statistics():
    def experts():
        return [nn.Sequential(nn.Conv2d(4, 6, 8), nn.BatchNorm2d(6)) for _ in range(2)]  # 8x8 -> 1x1
    stage = MoEStage(experts(), 4, num_selected=1, noise=False).train()
    x = choose(stage, [[0], [1], [1]])
    y = stage(x)
    lone, pair = stage.experts
    torch.testing.assert_close(y[:1], lone[0](x[:1]) / math.sqrt(1 + 1e-5))  # running mean 0, variance 1
    assert lone[1].num_batches_tracked == 0 and pair[1].num_batches_tracked == 1
    assert all(m.training for m in stage.modules())


def test_router_hears_the_task_at_one_expert_an_image():
    torch.manual_seed(0)
    stage = MoEStage(conv_experts(3), 4, num_selected=1, noise=False, constraint=None)
    nn.init.normal_(stage.router.weight)
    stage(torch.randn(4, 4, 8, 8)).square().sum().backward()
    assert stage.router.weight.grad.abs().sum() > 1e-3


def test_losses_are_recorded_and_reach_the_gate():
    losses = (('importance_unbiased', 0.5), ('kl', 0.25))
    stage = MoEStage(conv_experts(4), 4, num_selected=1, noise=False, constraint=None, losses=losses)
    x = choose(stage, [[3], [3]])
    with routing_context() as context:
        stage(x)
    losses = auxiliary_losses(context.routings)
    # One of 4 experts takes all: unbiased squared CV is E = 4, KL is ln 4.
    assert losses['importance_unbiased'].item() == pytest.approx(0.5 * 4, rel=1e-5)
    assert losses['kl'].item() == pytest.approx(0.25 * math.log(4), rel=1e-4)
    sum(losses.values()).backward()
    assert stage.router.weight.grad is not None


@pytest.mark.parametrize('gate', GATES)
def test_gate_of_a_padded_image_is_that_of_the_image_alone(gate):
    torch.manual_seed(0)
    stage = MoEStage(conv_experts(4), 4, gate=gate, noise=False).eval()
    nn.init.normal_(stage.router.weight)
    small, large = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 4, 8)
    padded = nn.functional.pad(small, (0, 3, 0, 1), value=7.)  # what a network leaves in the padding is not zero
    # Stride 8: true 24x40 and 32x64 pixels in a batch of 32x64.
    with routing_context(torch.tensor([[24, 40], [32, 64]]), (32, 64)) as context:
        stage(torch.cat([padded, large]))
    with routing_context() as alone:
        stage(small)
        stage(large)
    torch.testing.assert_close(
        context.routings[0].logits, torch.cat([routing.logits for routing in alone.routings]))


def test_copies_of_a_dense_stage_differ_alike_everywhere_and_keep_norms():
    torch.manual_seed(0)
    dense = conv_experts(1, nn.BatchNorm2d)[0]
    one = MoEStage.from_dense(dense, 4, num_experts=3, perturb=0.1)
    two = MoEStage.from_dense(dense, 4, num_experts=3, perturb=0.1)
    for e in range(3):
        moved = (one.experts[e][0].weight - dense[0].weight).std() / dense[0].weight.std()
        assert 0.08 < moved < 0.12
        assert torch.equal(one.experts[e][0].weight, two.experts[e][0].weight)  # no rank draws its own
        assert torch.equal(one.experts[e][1].weight, dense[1].weight)
    assert not torch.equal(one.experts[0][0].weight, one.experts[1][0].weight)


def test_dense_weights_load_into_every_expert():
    torch.manual_seed(0)
    dense, stem = conv_experts(1, nn.BatchNorm2d)[0], nn.Conv2d(3, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MoEStage(conv_experts(2, nn.BatchNorm2d), 4, perturb=0.))
    found = model.load_state_dict(nn.Sequential(stem, dense).state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ['1.router.weight', '1.router.noise_weight']
    for expert in model[1].experts:
        assert torch.equal(expert[0].weight, dense[0].weight)
        assert torch.equal(expert[1].running_mean, dense[1].running_mean)
    own = copy.deepcopy(model)
    own.load_state_dict(model.state_dict(), strict=True)  # its own weights are untouched by the expansion


def test_trace_holds_for_images_that_choose_other_experts():
    stage = MoEStage(conv_experts(3), 4, num_selected=1).eval()
    first, other = choose(stage, [[0], [0]]), choose(stage, [[2], [1]])
    with torch.no_grad():
        traced = torch.jit.trace(stage, (first,), check_trace=False)
        torch.testing.assert_close(traced(other), stage(other))


def test_meta_compile_and_export():
    stage = MoEStage(conv_experts(3), 4, num_selected=2, noise=False).eval()
    nn.init.normal_(stage.router.weight)
    x = torch.randn(2, 4, 8, 8)
    assert copy.deepcopy(stage).to('meta')(x.to('meta')).shape == (2, 6, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(stage, backend='aot_eager')(x), stage(x))
        torch.testing.assert_close(torch.export.export(stage, (x,)).module()(x), stage(x))


def test_cost_and_parameters_by_hand():
    stage = MoEStage(conv_experts(4, lambda c: nn.Identity()), 4, num_selected=2)
    expert = 6 * 4 * 9 + 6
    # Gate: 4 channels to 4 experts; an expert: 4x4 output positions of 6 x 4 x 9.
    assert stage.max_macs((3, 4, 8, 8)) == 3 * (4 * 4 + 2 * 16 * 6 * 4 * 9)
    with FlopCounterMode(display=False) as counter:
        stage.max_macs((3, 4, 8, 8))
    assert counter.get_total_flops() == 0  # a cost asked for while something is counted does not count itself
    assert stage.active_parameters() == 2 * expert + 2 * 4 * 4  # the gate has a noise matrix of the same size
    assert [len(group) for group in stage.expert_parameters()] == [4, 4]
    assert next(stage.parameters()).device.type == 'cpu'


def test_trace_routing_names_the_stage():
    model = nn.Sequential(nn.Identity(), MoEStage(conv_experts(3), 4))
    with trace_routing(model.eval()) as trace:
        model(torch.randn(2, 4, 8, 8))
    assert list(trace) == ['1'] and trace['1'][0].shape == (2,)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r'num_selected=4 with num_experts=3: choose between 1 and 3'):
        MoEStage(conv_experts(3), 4, num_selected=4)
    with pytest.raises(InputError, match='num_experts=0'):
        MoEStage.from_dense(nn.Conv2d(4, 4, 1), 4, num_experts=0)
    with pytest.raises(InputError, match='SyncBatchNorm inside the experts'):
        MoEStage(conv_experts(2, nn.SyncBatchNorm), 4)


def test_matrices_are_perturbed_by_their_own_deviation_and_vectors_are_not():
    matrix, vector = torch.tensor([[1., 3.] * 50] * 50), torch.ones(4)  # 5,000 numbers of deviation 1
    changed = perturbed(matrix, 'fc.weight', 1, 0.1)
    assert (changed - matrix).std().item() == pytest.approx(0.1, rel=.05)
    assert torch.equal(changed, perturbed(matrix, 'fc.weight', 1, 0.1))
    for other in (perturbed(matrix, 'fc.weight', 2, 0.1), perturbed(matrix, 'fc2.weight', 1, 0.1)):
        assert not torch.equal(changed, other)
    assert torch.equal(perturbed(vector, 'fc.bias', 1, 0.1), vector)
    assert torch.equal(perturbed(matrix, 'fc.weight', 1, 0.), matrix)


# Statistics of some images of a batch

SEEN = torch.tensor([True, False, True])


def norms_of_three_images(images, size=4, **kwargs):
    """A norm that met the whole batch but was told of some images, one that met only these, and both outputs."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, size, size, requires_grad=True)
    norm = nn.BatchNorm2d(2, **kwargs).train()
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    plain = copy.deepcopy(norm)
    with batch_norm_of_images(images):
        out = norm(x)
    return x, norm, plain, out


@pytest.mark.parametrize('kwargs', [{}, dict(affine=False), dict(momentum=0.5, eps=0.1), dict(momentum=None)])
def test_statistics_are_those_of_the_images_that_count(kwargs):
    x, norm, plain, out = norms_of_three_images(SEEN, **kwargs)
    expected = plain(x[SEEN])
    torch.testing.assert_close(out[SEEN], expected)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    assert norm.num_batches_tracked == 1 and not torch.equal(norm.running_mean, torch.zeros(2))
    slope = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    found, wanted = (torch.autograd.grad((y * slope).sum(), x)[0] for y in (out[SEEN], expected))
    torch.testing.assert_close(found, wanted)
    assert not found[1].any()  # the other image does not matter


@pytest.mark.parametrize('images, size', [(torch.zeros(3, dtype=torch.bool), 4), (SEEN.roll(1) & SEEN, 1)])
def test_running_statistics_stand_in_where_there_is_no_more_than_one_value(images, size):
    """None of the images, and one image of one pixel: what the norm is in evaluation, and it learns nothing."""
    x, norm, plain, out = norms_of_three_images(images, size)
    torch.testing.assert_close(out, plain.eval()(x))
    assert norm.running_mean.tolist() == [0, 0] and norm.running_var.tolist() == [1, 1]


def test_norms_without_running_statistics_in_other_precisions_and_in_evaluation():
    x, norm, plain, out = norms_of_three_images(SEEN, track_running_stats=False)
    torch.testing.assert_close(out[SEEN], plain(x[SEEN]))
    with batch_norm_of_images(SEEN):
        assert nn.BatchNorm2d(2).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        still = nn.BatchNorm2d(2).eval()
        torch.testing.assert_close(still(x), x / (1 + 1e-5) ** .5)  # whose statistics are 0 and 1
