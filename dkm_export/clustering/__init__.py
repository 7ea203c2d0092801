"""The mathematics of differentiable k-means: tensors in, tensors out."""

from dkm_export.clustering.dkm import Clusters, Gradient, Reduce, soft_cluster
from dkm_export.clustering.kmeans import (
    assign,
    inertia,
    initial_centroids,
    nearest,
    quick_centroids,
)

__all__ = [
    "Clusters",
    "Gradient",
    "Reduce",
    "assign",
    "inertia",
    "initial_centroids",
    "nearest",
    "quick_centroids",
    "soft_cluster",
]
