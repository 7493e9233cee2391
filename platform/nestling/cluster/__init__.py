"""Where a run computes: a Ray cluster, started here or joined, and a place for what its processes print."""

from nestling.cluster.local import ClusterError, connected
from nestling.cluster.output import redirected

__all__ = ["ClusterError", "connected", "redirected"]
