"""What the experiment of balanced experts measures, on tables and a gate that can be worked out by hand."""
import pytest
import timm
import torch

from moe_zoo.reproduce.balance import STAGE, mutual_information, sweep, use
from moe_zoo.reproduce.training import Data, Split


@pytest.mark.parametrize('joint, bits', [
    ([[0.5, 0.], [0., 0.5]], 1.),  # the expert names the class
    ([[0.25, 0.25], [0.25, 0.25]], 0.),
    ([[0.5, 0.], [0.5, 0.]], 0.),  # one expert does all
    ([[0.25, 0., 0., 0.], [0., 0.25, 0., 0.], [0., 0., 0.25, 0.], [0., 0., 0., 0.25]], 2.),
    # p(y) = 1/2 each, p(e) = 3/4 and 1/4: 1/2 log2(4/3) + 1/4 log2(2/3) + 1/4 log2(2)
    ([[0.5, 0.], [0.25, 0.25]], 0.5 * 0.415037 - 0.25 * 0.584963 + 0.25),
])
def test_mutual_information_by_hand(joint, bits):
    assert mutual_information(torch.tensor(joint)) == pytest.approx(bits, abs=1e-5)


def test_the_use_of_experts_by_hand():
    # Logits are twice and once the mean of the first channel after stage 3, which is not negative, for experts 0 and 1,
    # and below them for 2 and 3: every image chooses 0 and 1. Chosen counts 6, 6, 0, 0: mean 3, deviation 3.
    model = timm.create_model(
        'moe_resnet18_cifar', layers=(1, 1, 1, 2), channels=(8, 8, 8, 8), in_chans=1, num_classes=3).eval()
    weight = torch.zeros(4, 8)
    weight[:, 0] = torch.tensor([2., 1., -1., -2.])
    model.get_submodule(STAGE).router.weight.data.copy_(weight)
    model.layer3[0].bn2.bias.data.fill_(1.)  # a map without zeros
    split = Split(torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2]))
    data = Data(split, split, split, 3, '')
    found = use(model, data)
    assert found['cv'] == pytest.approx(100) and found['living'] == 2
    assert found['pairs'] == [[6, 6, 0, 0], [6, 6, 0, 0], [0] * 4, [0] * 4]
    assert 100 < found['cv_importance'] < 173.3  # between two equal experts and one alone, sqrt(3)
    rows = torch.tensor(found['classes'])
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(3, dtype=rows.dtype))
    assert (rows[:, 2:] == 0).all() and (rows[:, 0] > 0.5).all()
    assert 0 <= found['information'] < 0.1
    assert set(sweep(model, data)) == {'k1', 'k2', 'k3', 'k4'} and model.get_submodule(STAGE).num_selected == 2
