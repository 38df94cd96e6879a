"""What timm asks of a model, of one at hand: its own tests build models by name, and cannot have one that was pruned.

Letters: B images.
"""
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


def fx_model(model: nn.Module) -> nn.Module:
    """The graph of a model, traced as timm traces it; it returns a dictionary of one."""
    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    train, evaluation = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:], tracer_kwargs=options)


def check_host_contract(model: nn.Module, size: int = 32) -> None:
    """Run everything; the head is gone afterwards."""
    x = torch.randn(2, 3, size, size)
    for parameter in model.parameters():
        parameter.grad = None
    model.train()(x).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, model.num_classes) and expected.isfinite().all()
        _check_close(model(x[1:]), expected[1:])  # without the other image
        _check_features(model, x, expected)
        _check_made_again(model, x, expected)
        _check_close(torch.jit.script(model)(x), expected)
        _check_close(next(iter(fx_model(model)(x).values())), expected)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)


def _check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def _check_features(model: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    channels = [level['num_chs'] for level in model.feature_info]
    last, maps = model.forward_intermediates(x)
    assert [each.shape[1] for each in maps] == channels
    _check_close(model.forward_head(last), expected)


def _check_made_again(model: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    again = timm.create_model(model.pretrained_cfg['architecture'], **model._model_args).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)
