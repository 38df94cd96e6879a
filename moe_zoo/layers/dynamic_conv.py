"""Dynamic Convolution: every convolution attends over K parallel kernels and runs their mixture.

Dynamic Convolution: Attention over Convolution Kernels, Chen, Dai, Liu, Chen, Yuan, Liu, CVPR 2020,
https://arxiv.org/abs/1912.03458. W(x) = pi_1(x) W_1 + ... + pi_K(x) W_K, bias likewise, the attention pi summing to
one. Against CondConv: a softmax in the place of sigmoids, a hidden layer, and an attention for every layer, from that
layer's own input, not one for a block.

Letters: B images, C input channels, O output channels, H x W positions, E experts (the paper's K).
"""
import numbers

from ..errors import InputError
from ..routing import AnnealedSoftmaxRouter, SoftmaxRouter
from .cond_conv import MixedConv2d


class DynamicConv2d(MixedConv2d):
    """Convolution whose kernel is mixed, for every image, by an attention on its input; drop-in for nn.Conv2d.

    pi = softmax(z / T), z = FC(relu(FC(pool(x)))) with C // reduction hidden units (at least one), in float32.

    T starts at `temperature` and falls linearly to 1 over `anneal_epochs`, so that all kernels learn before the
    attention may choose. It follows from the number of the epoch, a buffer that is saved with the weights and counts
    in evaluation too. `tools/train_imagenet.py` and `moe-zoo run train.py` set it; any other loop makes one call:

    >>> for epoch in range(epochs):
    ...     moe_zoo.routing.set_epoch(model, epoch)
    ...     train_one_epoch(model)

    Without that call T stays where it is. To fine-tune finished weights at T = 1, create the model with temperature=1.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: int or (height, width).
        stride: int or (height, width).
        padding: int, (height, width), or timm's '' (symmetric), 'same' (TensorFlow's), 'valid'.
        dilation: int or (height, width).
        groups: As in nn.Conv2d.
        bias: Mixed like the kernel where present.
        num_experts: E.
        reduction: Channels of the input to hidden units of the attention.
        temperature: T of the first epoch.
        anneal_epochs: Epochs until T is 1; 0 keeps it constant.

    Raises:
        InputError: `reduction` below 1, `anneal_epochs` below 0, a temperature of 0 or, annealed, below 1.

    Shapes:
        (B, C, H, W) -> (B, O, H', W').
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size=3,
            stride=1,
            padding='',
            dilation=1,
            groups: int = 1,
            bias: bool = False,
            num_experts: int = 4,
            reduction: int = 4,
            temperature: float = 30.,
            anneal_epochs: int = 10,
            device=None,
            dtype=None,
    ):
        if not isinstance(reduction, numbers.Integral) or reduction < 1:
            raise InputError(f'reduction={reduction!r}: use a whole number of at least 1.')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, num_experts, **dd)
        kwargs = dict(temperature=temperature, hidden_features=max(1, in_channels // reduction), **dd)
        if anneal_epochs == 0:
            router = SoftmaxRouter(in_channels, num_experts, **kwargs)
        else:
            router = AnnealedSoftmaxRouter(in_channels, num_experts, anneal_epochs=anneal_epochs, **kwargs)
        self.set_router(router, num_experts)
