"""Memory of a training step, by the count of torch's allocator."""
import pytest
import timm
import torch
from torch.nn import functional as F

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis.model_cases import widen
from moe_zoo.analysis.timing import peak_memory
from moe_zoo.cards import card, dense_twin
from moe_zoo.losses import auxiliary_losses

SMALL = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10)


def bytes_of_a_step(model: torch.nn.Module, x: torch.Tensor) -> int:
    """At most at one time, gradients among them, beyond the weights and the moments of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    target = torch.zeros(len(x), dtype=torch.long)

    def step():
        output = model(x)
        output, routings = output if isinstance(output, tuple) else (output, [])
        sum(auxiliary_losses(routings).values(), F.cross_entropy(output, target)).backward()
        optimizer.step()
    step()  # which makes the moments
    optimizer.zero_grad()
    return peak_memory(step, 'cpu')


@pytest.mark.parametrize('sizes, batch_size', [
    (SMALL, 8), pytest.param({}, 4, marks=pytest.mark.slow)])
def test_a_vmoe_step_holds_what_a_dense_one_holds_and_its_experts(sizes, batch_size):
    """1.3 times the dense twin of equal MACs, which has one MLP of the width of the two chosen experts, and weights,
    gradients and both moments of the other six. Weights and moments are there already, so both sides go without."""
    model = timm.create_model('vmoe_vit_s', **sizes)
    model.set_aux_loss(True)
    name, keywords = dense_twin(card('vmoe_vit_s'))
    twin = timm.create_model(name, **{**keywords, **sizes})
    assert widen(twin, model)
    numbers = [sum(p.numel() for p in m.parameters()) for m in (model, twin)]
    x = torch.rand(batch_size, 3, *model.patch_embed.img_size)
    ours, dense = (bytes_of_a_step(m, x) for m in (model, twin))
    gradients = 4 * (numbers[0] - numbers[1])
    assert gradients > 0 and ours - gradients <= 1.3 * dense
    assert ours > gradients + 0.5 * dense  # or it was not counted
