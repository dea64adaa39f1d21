"""veripo-fast: the GRPO -> verifier -> DPO loop of VerIPO (arXiv 2505.19000) for Video-LLMs.

Importing this package imports neither torch nor any GPU library.
"""

__version__ = "0.1.0"
