"""The caching policies. A new policy is one file here, one entry in ``registry.POLICIES`` and one test."""

from moeca_dist.cache.policies.registry import POLICIES, build_policy

__all__ = ["POLICIES", "build_policy"]
