"""Classification of single texts: cross-entropy, and focal loss for classes of very different size.

For a text with logits z and the class y, p = softmax(z)_y, and the weight w_y of its class (1 where there are none):

    cross_entropy:  loss = -log p                       mean = sum of w_y·loss / sum of w_y
    focal:          loss = -(1 - p)^gamma·log p         mean = sum of w_y·loss / sum of w_y

Both sums of the mean go over the texts of all workers. Dividing each worker's sum by its own weights would make the
result depend on which worker a text fell to; here the loss of a worker is

    W · (sum of w_y·loss over its texts) / (sum of w_y over the texts of all workers)

whose average over the W workers, which is what data parallelism takes of gradients, is the mean above.

Use cross-entropy by default, with class weights "balanced" where rare classes count as much as common ones (macro F1
rather than accuracy). Use focal where most texts are easy and drown the hard ones; gamma 0 is cross-entropy.
Source: Lin et al. 2017 (focal loss); balanced weights n / (C·n_c): King and Zeng 2001.

Shape legend: B texts of this worker, C classes, W workers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raytower.collectives import gather_constants, world_size
from raytower.errors import InputError
from raytower.objectives.config import CrossEntropy, Focal
from raytower.objectives.targets import found_wrong


def cross_entropy(
    settings: CrossEntropy, logits_BC: Tensor, classes_B: Tensor, weights_C: Tensor | None = None
) -> Tensor:
    """This worker's loss, a scalar.

    Args:
        settings: not read; cross-entropy has class weights alone, and they come as `weights_C`.
        logits_BC: (B, C).
        classes_B: (B,) int64, each in 0..C-1.
        weights_C: (C,), from `weights_of`.

    Raises:
        InputError: a class lies outside 0..C-1.
    """
    return _weighted_mean(_log_loss(logits_BC, classes_B), classes_B, weights_C)


def focal(settings: Focal, logits_BC: Tensor, classes_B: Tensor, weights_C: Tensor | None = None) -> Tensor:
    """This worker's loss, a scalar, of logits (B, C), classes (B,) and weights (C,). Errors as for `cross_entropy`."""
    log_loss_B = _log_loss(logits_BC, classes_B)
    # 1 - p without cancellation. Where p rounds to 1, a power below 1 would have an infinite slope at 0 and make
    # the gradient NaN; the floor ends it.
    miss_B = (-torch.expm1(-log_loss_B)).clamp(min=torch.finfo(logits_BC.dtype).eps ** 2)
    return _weighted_mean(miss_B**settings.gamma * log_loss_B, classes_B, weights_C)


def weights_of(settings: CrossEntropy | Focal, labels: Sequence[str], counts: Sequence[int]) -> Tensor | None:
    """The weight (C,) of each class, or None without class weights.

    Args:
        settings: `class_weights` says what the weights are.
        labels: of the classes, in the order of the logits.
        counts: training rows of each class. A class without any weighs 1 under "balanced": no row uses it.

    Raises:
        InputError: class_weights names a label that is none.
    """
    given = settings.class_weights
    if given is None:
        return None
    if given == "balanced":
        share = sum(counts) / len(labels)
        return torch.tensor([share / count if count else 1.0 for count in counts])
    for label in given:
        if label not in labels:
            nearest = difflib.get_close_matches(label, labels, n=1, cutoff=0.0)[0]
            raise InputError(
                f"objective.class_weights names {label!r}, which is none of the {len(labels)} labels; the "
                f"nearest is {nearest!r}"
            )
    return torch.tensor([given.get(label, 1.0) for label in labels])


def _log_loss(logits_BC: Tensor, classes_B: Tensor) -> Tensor:
    num_classes = logits_BC.shape[1]
    wrong_B = (classes_B < 0) | (classes_B >= num_classes)
    if found_wrong(wrong_B):
        raise InputError(
            f"class {int(classes_B[wrong_B][0])} is outside 0..{num_classes - 1}; the model has {num_classes} classes"
        )
    return nn.functional.cross_entropy(logits_BC, classes_B, reduction="none")


def _weighted_mean(losses_B: Tensor, classes_B: Tensor, weights_C: Tensor | None) -> Tensor:
    weights_B = torch.ones_like(losses_B) if weights_C is None else weights_C.to(losses_B)[classes_B]
    total = gather_constants(weights_B.detach().sum().reshape(1)).sum()
    return world_size() * (weights_B * losses_B).sum() / total
