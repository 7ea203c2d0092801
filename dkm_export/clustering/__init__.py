"""The mathematics of differentiable k-means: tensors in, tensors out."""

from dkm_export.clustering.dkm import Clusters, soft_cluster
from dkm_export.clustering.kmeans import assign, initial_centroids, mean_squared_distance

__all__ = ["Clusters", "assign", "initial_centroids", "mean_squared_distance", "soft_cluster"]
