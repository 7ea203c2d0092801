"""How two sets of numbers, or of embeddings, agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman correlation of the cosine similarities of all pairs, between two sets of embeddings.

    Args:
        first: ``[sentences, width]``, of at least three sentences.
        second: of the same sentences, of any width.

    Returns:
        -1 to 1; 1 when both order all pairs of sentences alike.
    """
    row, column = torch.triu_indices(len(first), len(first), 1).unbind()
    similarities = (F.normalize(each.double()) for each in (first, second))
    return spearman(*((each @ each.T)[row, column] for each in similarities))


def spearman(first: Tensor, second: Tensor) -> float:
    """Correlation of the ranks of two vectors, -1 to 1; equal values share their mean rank."""
    return pearson(_ranks(first), _ranks(second))


def pearson(first: Tensor, second: Tensor) -> float:
    """Linear correlation of two vectors, -1 to 1; 0 when one of them is constant."""
    first, second = (each.double() - each.double().mean() for each in (first, second))
    size = first.norm() * second.norm()
    return ((first @ second) / size).item() if size else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return middle[place]
