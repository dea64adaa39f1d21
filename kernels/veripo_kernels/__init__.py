"""RL and preference losses for large vocabularies: definitions now, Triton kernels beside them later.

Usable alone: `from veripo_kernels import reference`. Never imports veripo_fast.
"""

from veripo_kernels import reference

__all__ = ["reference"]
