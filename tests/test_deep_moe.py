"""Channel gates and the shallow embedding: arithmetic, records, losses, and that dead channels are not there."""
import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis import count
from moe_zoo.errors import InputError
from moe_zoo.layers import ChannelGate, ShallowEmbedding, sparse_inference
from moe_zoo.losses import auxiliary_losses
from moe_zoo.models.deepmoe_blocks import GatedBasicBlock, GatedBottleneck, GatedPlainBlock
from moe_zoo.routing import Routing, routing_context, trace_routing

D = 3  # mixture weights


def tiny(name: str = 'deepmoe_resnet56_cifar', **kwargs) -> nn.Module:
    """Three residual blocks of 4 to 8 channels, in evaluation, with gates of both signs and norms that do something."""
    keywords = dict(layers=(1, 1, 1), channels=(4, 6, 8), num_classes=5, embed_widths=(4, 6), gate_init=(-1., 1.))
    model = timm.create_model(name, **{**keywords, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def images(batch: int = 1, size: int = 16, **kwargs) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, **kwargs)


def block_of(cls, *args, live=None, **kwargs) -> tuple:
    """A block in float64 whose gates are 0.5 on the `live` channels of every gate (a set for each) and 0 elsewhere, by
    the mixture weights (0.5, 0, 0)."""
    block = cls(*args, dtype=torch.float64, **kwargs)
    block.add_gates(D)
    for gate, channels in zip(block.gates(), live or []):
        gate.weight.data.fill_(-1.)
        gate.weight.data[sorted(channels)] = 1.
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return block.eval(), torch.tensor([[0.5, 0., 0.]])


# Gates and embedding

def test_gates_are_the_positive_part_of_a_linear_map():
    gate = ChannelGate(3, 2, l1=0.5)
    gate.weight.data = torch.tensor([[1., 2.], [-3., 1.], [0.5, 0.5]])
    with routing_context() as context:
        gates = gate.gates(torch.tensor([[0.5, 0.5], [1., 0.]]))
    # W e: (1.5, -1, 0.5) and (1, -3, 0.5)
    assert gates.tolist() == [[1.5, 0., 0.5], [1., 0., 0.5]]
    routing, = context.routings
    assert routing.logits.tolist() == [[1.5, -1., 0.5], [1., -3., 0.5]]
    assert routing.gates is routing.weights and torch.equal(routing.gates, gates)
    assert (routing.indices, routing.shape, routing.losses) == (None, (2,), (('gate_l1', 0.5),))
    # L1: 2 for the first image and 1.5 for the second, mean 1.75, half of it
    assert auxiliary_losses(context.routings)['gate_l1'].item() == 0.875
    # The batch size does not matter, the number of layers does.
    twice = [Routing(*(torch.cat([f, f]) if isinstance(f, torch.Tensor) else f for f in routing))] * 2
    assert auxiliary_losses(twice)['gate_l1'].item() == 1.75


def test_gates_are_float32_in_any_network():
    gate = ChannelGate(4, 2, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        assert gate.gates(torch.rand(1, 2)).dtype == torch.float32


def test_initialisation():
    assert ChannelGate(4, 2).weight.tolist() == [[1., 1.]] * 4
    weight = ChannelGate(200, 10, init=(-0.5, 1.)).weight
    assert -0.5 <= weight.min() < -0.4 and 0.9 < weight.max() <= 1.
    for bad in ('one', (1.,)):
        with pytest.raises(InputError, match=r"gate_init=.*: use 'ones', or two numbers \(low, high\)"):
            ChannelGate(4, 2, init=bad)


def test_a_softmax_embedding_of_ones_gives_gates_of_one():
    embedding = ShallowEmbedding(10, widths=(4, 8), stem_width=4)
    e = embedding(images(3))
    assert e.shape == (3, 10) and e.dtype == torch.float32
    torch.testing.assert_close(e.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(ChannelGate(6, 10).gates(e), torch.ones(3, 6))
    logits = ShallowEmbedding(10, widths=(4, 8), stem_width=4, softmax=False)
    logits.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(torch.softmax(logits(images(3)), dim=1).sum(), torch.tensor(3.))
    assert not torch.allclose(logits(images(3)).sum(dim=1), torch.ones(3))


def test_the_embedding_predicts_the_class():
    embedding = ShallowEmbedding(10, widths=(4,), stem_width=0, loss_weight=0.5)
    x, target = images(2), torch.tensor([3, 7])
    with routing_context() as context:
        e = embedding(x)
    loss = auxiliary_losses(context.routings, target)
    # e is the softmax of the logits: the cross-entropy is the mean of -log e_target.
    expected = -0.5 * (e[0, 3].log() + e[1, 7].log()) / 2
    torch.testing.assert_close(loss, {'embedding': expected})
    # With other mixture weights than classes, a linear layer makes the prediction; e does not depend on it.
    embedding.reset_classifier(4)
    with routing_context() as context:
        torch.testing.assert_close(embedding(x), e)
    assert context.routings[0].logits.shape == (2, 4)
    embedding(x).sum().backward()
    assert not embedding.classifier.weight.grad.any()  # zero, not None: DDP waits for it
    embedding.reset_classifier(0)
    with routing_context() as context:
        embedding(x)
    assert embedding.classifier is None and context.routings[0].losses == ()


def test_padding_does_not_move_the_gates():
    embedding = ShallowEmbedding(4, widths=(4, 8), stem_width=0).eval()
    x = images(1, 16)
    padded = F.pad(x, (0, 16, 0, 16))
    with torch.no_grad():
        alone = embedding(x)
        with routing_context(torch.tensor([[16, 16]]), (32, 32)):
            inside = embedding(padded)
        blind = embedding(padded)
    # A cell of 4 pixels at the border sees one padded pixel, which is zero like the padding of the convolution.
    torch.testing.assert_close(inside, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(blind, alone, rtol=1e-3, atol=1e-4)


def test_bad_embeddings_are_refused():
    with pytest.raises(InputError, match='embed_dim=0: the embedding needs at least one mixture weight'):
        ShallowEmbedding(0)
    with pytest.raises(InputError, match='embed_widths is empty'):
        ShallowEmbedding(10, widths=())


# Blocks: a gate stands after the norm

def test_a_basic_block_by_hand():
    block, e = block_of(GatedBasicBlock, 4, 4, live=[{0, 2}, {1}], width=2.)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    g1, g2 = torch.zeros(8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    g1[[0, 2]] = 0.5
    g2[1] = 0.5
    with torch.no_grad():
        y = F.relu(block.bn1(block.conv1(x)) * g1[:, None, None])
        y = block.bn2(block.conv2(y)) * g2[:, None, None]
        assert torch.equal(block(x, e.expand(2, -1)), F.relu(y + x))


@pytest.mark.parametrize('bottleneck, gated', [('A', [1, 2]), ('B', [2])])
def test_bottleneck_types(bottleneck, gated):
    block, e = block_of(GatedBottleneck, 8, 4, bottleneck=bottleneck, width=2., downsample=nn.Conv2d(8, 16, 1).double())
    assert [i for i in (1, 2, 3) if getattr(block, f'gate{i}') is not None] == gated
    # 4 planes; gated ones are doubled; the block leaves 16 channels as it would without gates
    widths = [getattr(block, f'conv{i}').out_channels for i in (1, 2, 3)]
    assert widths == ([8, 8, 16] if bottleneck == 'A' else [4, 8, 16])
    assert block.num_experts == sum(widths[i - 1] for i in gated)
    assert block(torch.randn(1, 8, 3, 3, dtype=torch.float64), e).shape == (1, 16, 3, 3)


def test_parts_that_blocks_do_not_have_are_refused():
    with pytest.raises(InputError, match='cardinality=2: DeepMoE blocks have none; leave it out'):
        timm.create_model('deepmoe_resnet50', cardinality=2, device='meta')
    with pytest.raises(InputError, match="attn_layer='se': DeepMoE blocks have none"):
        timm.create_model('deepmoe_resnet18', block_args=dict(attn_layer='se'), device='meta')


# A dead channel is a channel that is not there

def removed(block: GatedBottleneck, live1: list, live2: list) -> nn.Module:
    """The bottleneck with its dead channels cut out of the tensors, and the scales of the live ones folded nowhere."""
    cut = copy.deepcopy(block)
    cut.conv1.weight.data = cut.conv1.weight.data[live1]
    cut.conv2.weight.data = cut.conv2.weight.data[live2][:, live1]
    cut.conv3.weight.data = cut.conv3.weight.data[:, live2]
    for norm, gate, live in ((cut.bn1, cut.gate1, live1), (cut.bn2, cut.gate2, live2)):
        for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias, gate.weight):
            each.data = each.data[live]
    return cut


def test_live_channels_are_the_network_without_the_dead_ones_to_the_bit():
    live1, live2 = [1, 4, 6], [0, 3]
    block, e = block_of(GatedBottleneck, 16, 4, live=[live1, live2], width=2.)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    e = e.expand(2, -1)
    with torch.no_grad():
        expected = removed(block, live1, live2)(x, e)
        with sparse_inference(block):
            assert torch.equal(block(x, e), expected)
        torch.testing.assert_close(block(x, e), expected)  # with zeros: in another order of summation


def test_multiplying_by_zero_is_removing_to_the_bit():
    # Integers and halves throughout, so that no order of summation rounds: norms divide by sqrt(1/4).
    live1, live2 = [1, 4, 6], [0, 3]
    block, e = block_of(GatedBottleneck, 16, 4, live=[live1, live2], width=2.)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = torch.randint(-2, 3, module.weight.shape).double()
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.
            module.running_mean.data = torch.randint(-3, 4, module.running_mean.shape).double()
            module.running_var.data.fill_(0.25)
            module.bias.data.fill_(0.5)
    x = torch.randint(-4, 5, (2, 16, 6, 6)).double()
    e = e.expand(2, -1)
    with torch.no_grad():
        expected = removed(block, live1, live2)(x, e)
        assert torch.equal(block(x, e), expected) and expected.any()
        with sparse_inference(block):
            assert torch.equal(block(x, e), expected)


@pytest.mark.parametrize('cls, live', [
    (GatedBasicBlock, [set(), {0, 1}]), (GatedBasicBlock, [{0, 3}, set()]), (GatedBasicBlock, [set(), set()]),
    (GatedBasicBlock, [{0, 1, 2, 3}, {0, 1, 2, 3}]), (GatedBottleneck, [set(), {1}]), (GatedBottleneck, [{1}, set()]),
    (GatedPlainBlock, [set()]), (GatedPlainBlock, [{2}]),
])
def test_no_channel_and_all_channels(cls, live):
    in_chs = 16 if cls is GatedBottleneck else 4
    block, e = block_of(cls, in_chs, 4, live=live)
    x = torch.randn(2, in_chs, 6, 6, dtype=torch.float64)
    e = e.expand(2, -1)
    with torch.no_grad():
        expected = block(x, e)
        with sparse_inference(block):
            torch.testing.assert_close(block(x, e), expected)


@pytest.mark.parametrize('name, kwargs', [
    ('deepmoe_resnet56_cifar', {}),
    ('deepmoe_vgg16_cifar', dict(stem_width=4)),
    ('deepmoe_resnet18', dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))),
    ('deepmoe_resnet50', dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))),
    ('deepmoe_resnet50', dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), bottleneck='B')),
])
def test_sparse_inference_computes_the_same(name, kwargs):
    model = tiny(name, **kwargs).double()
    x = images(3, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with trace_routing(model) as trace:
            model(x)
        with sparse_inference(model) as sparse:
            torch.testing.assert_close(sparse(x), expected)
            for i in range(3):
                torch.testing.assert_close(sparse(x[i:i + 1]), expected[i:i + 1])
            macs = [count(model, x[i:i + 1]).macs_executed for i in range(3)]
            together = count(model, x)
    live = [(records[0].gates > 0).float().mean().item() for where, records in trace.items() if 'gate' in where]
    assert all(0 < share < 1 for share in live)
    dense = count(model, x)
    assert dense.macs_executed == dense.macs_max == together.macs_max
    # The union of three images is at least as large as each of them, and smaller than everything.
    assert max(macs) * 3 <= together.macs_executed < dense.macs_executed
    assert not together.uncounted


def test_numbers_of_live_channels_recur():
    # 64 channels: whatever images want is filled up to a multiple of 64 / 16 = 4 by dead channels, the first there are.
    gates = torch.zeros(2, 64)
    gates[0, [3, 20, 41]] = 0.5
    gates[1, [3, 63]] = 0.25
    gate = ChannelGate(64, D)
    assert gate.live(gates).tolist() == [3, 20, 41, 63]
    assert gate.live(gates[:1]).tolist() == [3, 20, 41, 0]
    assert gate.live(gates[1:]).tolist() == [3, 63, 0, 1]
    assert gate.live(torch.zeros(1, 64)).tolist() == []
    assert gate.live((torch.arange(64) < 61).float()[None]) is None  # 61 to 64: all
    assert len(gate.live((torch.arange(64) < 60).float()[None])) == 60
    gate.keep = gates[0] != 0  # a mask of the user is taken as it is: its shapes recur anyway
    assert gate.live(gates).tolist() == [3, 20, 41]


@pytest.mark.parametrize('channels_last', [False, True])
def test_channels_that_fill_up_change_nothing(channels_last):
    # 5 and 9 of 32 channels are live: 6 and 10 are computed. Gradients go to what is live, and to nothing else.
    block, e = block_of(GatedBasicBlock, 32, 32, live=[range(1, 10, 2), range(1, 18, 2)])
    block.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64)
    expected = block(x, e)
    plain = torch.autograd.grad(expected.square().sum(), list(block.parameters()))
    shapes = []
    with sparse_inference(block), pytest.MonkeyPatch.context() as patch:
        conv2d = F.conv2d
        patch.setattr(F, 'conv2d', lambda x, weight, *args: shapes.append(weight.shape[:2]) or conv2d(x, weight, *args))
        found = block(x, e)
        cut = torch.autograd.grad(found.square().sum(), list(block.parameters()))
    torch.testing.assert_close(found, expected)
    assert shapes == [(6, 32), (10, 6)]  # 5 and 9, to multiples of 32 / 16 = 2
    for one, other in zip(cut, plain):
        torch.testing.assert_close(one, other)


def test_executed_macs_follow_the_identity():
    # p1 c1 + p1 p2 c2 + p2 c3 of the dense costs, and the gates: W is 16 x 3 and 16 x 3
    block, e = block_of(GatedBottleneck, 32, 8, live=[range(4), range(12)], width=2.)
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    c1, c2, c3 = 25 * 32 * 16, 25 * 16 * 16 * 9, 25 * 16 * 32
    with sparse_inference(block):
        cost = count(block, (x, e))
    assert cost.macs_executed == c1 // 4 + 3 * c2 // 16 + 3 * c3 // 4 + 2 * 16 * D
    assert cost.macs_max == c1 + c2 + c3 + 2 * 16 * D
    # Half of twice the channels costs what the narrow block costs.
    wide, e = block_of(GatedBottleneck, 32, 8, live=[range(8), range(8)], width=2.)
    narrow, _ = block_of(GatedBottleneck, 32, 8)
    with sparse_inference(wide):
        executed = count(wide, (x, e)).macs_executed
    assert executed - 2 * 16 * D == count(narrow, (x, e)).macs_executed - 2 * 8 * D == 25 * 8 * (32 + 72 + 32)


def test_the_overhead_is_counted_apart():
    model = tiny()
    with sparse_inference(model):
        cost = count(model, images())
    # 16 px: 3-4 at 8 x 8, 4-6 at 4 x 4, and the linear layer; it never shrinks.
    assert cost.by_module['embedding'] == 64 * 27 * 4 + 16 * 36 * 6 + 6 * 5
    assert cost.by_module['embedding'] == count(model, images()).by_module['embedding']


def test_a_given_mask_is_the_same_for_all_images():
    model = tiny().double()
    x = images(2, dtype=torch.float64)
    name = 'blocks.1.0.gate1'
    gate = model.get_submodule(name)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[1, 5, 6]] = True
    with torch.no_grad():
        with sparse_inference(model, keep={name: mask}):
            found = model(x)
        # The same as a head whose other rows are negative.
        gate.weight.data[~mask] = -1.
        torch.testing.assert_close(model(x), found)
    assert gate.keep is None
    for bad, message in (
            ({'blocks.1.0.gate3': mask}, r"keep: there is no gate 'blocks.1.0.gate3'\. Did you mean 'blocks\.1\.0\.ga"),
            ({name: mask[:3]}, r'is bool of shape \(3,\): give a bool mask of shape \(12,\)'),
            ({name: mask.float()}, r'is float32 of shape \(12,\): give a bool mask'),
    ):
        with pytest.raises(InputError, match=message):
            with sparse_inference(model, keep=bad):
                pass


def test_what_cannot_be_run_sparse_is_told():
    with pytest.raises(InputError, match='ResNet has no channel gates; use a DeepMoE model'):
        with sparse_inference(timm.create_model('resnet18', device='meta')):
            pass
    model = tiny()
    with pytest.raises(InputError, match=r"block 'blocks\.0\.0' is in training mode; call model\.eval\(\) first"):
        with sparse_inference(model.train()):
            pass
    model = tiny(norm_layer=lambda chs, **dd: nn.GroupNorm(2, chs, **dd))
    with pytest.raises(InputError, match='has a GroupNorm; channels can be left out of a BatchNorm2d'):
        with sparse_inference(model):
            pass


def test_sparse_inference_ends_with_its_context():
    model, x = tiny(), images()
    with pytest.raises(KeyError):
        with sparse_inference(model):
            raise KeyError
    assert not any(getattr(m, 'sparse', False) for m in model.modules())
    with sparse_inference(model):
        with sparse_inference(model):
            pass
        assert count(model, x).macs_executed < count(model, x).macs_max
        assert not model.train().get_submodule('blocks.0.0').runs_live(x)  # training needs every channel
    # A gate that is not a number must not look like a dead channel.
    model = tiny()
    model.get_submodule('blocks.0.0.gate1').weight.data.fill_(float('nan'))
    with torch.no_grad(), sparse_inference(model):
        assert model(x).isnan().all()
