"""Losses of the first mixtures of experts: pure functions of what every expert said, the gate's logits and the target.

Adaptive Mixtures of Local Experts, Jacobs, Jordan, Nowlan and Hinton, Neural Computation 3(1), 1991. In all of them
p = softmax(gate logits), and the result is the mean over items. The proportions and distances are float32 at least.

Letters: T items, E experts, O numbers an expert puts out.
"""
import torch


def mixture_loss(outputs: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln sum_i p_i exp(-||d - o_i||^2 / 2): experts compete to explain the target.

    Up to a constant the negative log-likelihood of a mixture of Gaussians of unit variance. The gradient of an item is
    -h_i (d - o_i) for the output of expert i and p_i - h_i for its logit, with h the `responsibilities`.

    >>> o, d = torch.tensor([[[0.], [2 ** .5]]]), torch.tensor([[0.]])  # squared distances 0 and 2
    >>> mixture_loss(o, torch.zeros(1, 2), d)  # -ln(1/2 (1 + 1/e))
    tensor(0.3799)

    Args:
        outputs: (T, E, O) output of every expert, o.
        logits: (T, E) of the gate.
        target: (T, O), d.
    """
    return -torch.logsumexp(_log_joint(outputs, logits, target), dim=-1).mean()


def responsibilities(outputs: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(T, E) posterior probability that an expert made the target: h_i = p_i exp(-||d - o_i||^2 / 2) / sum_j (...).

    Arguments are those of `mixture_loss`.
    """
    return torch.softmax(_log_joint(outputs, logits, target), dim=-1)


def competitive_loss(outputs: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """sum_i p_i ||d - o_i||^2: every expert on its own is to be right, in proportion to its gate.

    An expert learns by 2 p_i (o_i - d): slowly where its gate is small, however well it fits. Arguments are those of
    `mixture_loss`.
    """
    return (torch.softmax(_float(logits), dim=-1) * _squared_distance(outputs, target)).sum(dim=-1).mean()


def cooperative_loss(outputs: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """||d - sum_i p_i o_i||^2: the experts together are to be right, so that each corrects what the others leave.

    Arguments are those of `mixture_loss`.
    """
    blend = (torch.softmax(_float(logits), dim=-1).unsqueeze(-1) * _float(outputs)).sum(dim=-2)
    return (_float(target) - blend).square().sum(dim=-1).mean()


def class_mixture_loss(class_logits: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln sum_i p_i p_i(y): the mixture for experts that say class probabilities instead of numbers.

    Args:
        class_logits: (T, E, classes) of every expert; p_i(y) is their softmax.
        logits: (T, E) of the gate.
        target: (T,) classes.
    """
    index = target.reshape(-1, 1, 1).expand(-1, class_logits.shape[1], 1)
    log_right = torch.log_softmax(_float(class_logits), dim=-1).gather(2, index).squeeze(2)  # (T, E) ln p_i(y)
    return -torch.logsumexp(torch.log_softmax(_float(logits), dim=-1) + log_right, dim=-1).mean()


def _log_joint(outputs: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(T, E) ln p_i - ||d - o_i||^2 / 2. In logarithms, because exp(-||.||^2 / 2) of a far-off expert is 0."""
    return torch.log_softmax(_float(logits), dim=-1) - _squared_distance(outputs, target) / 2


def _squared_distance(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (_float(outputs) - _float(target).unsqueeze(-2)).square().sum(dim=-1)


def _float(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
