"""PTMQ: several widths from one post-training reconstruction (Xu et al., AAAI 2024)."""

from flexiq_jax.methods.ptmq.method import Ptmq, PtmqSettings

__all__ = ["Ptmq", "PtmqSettings"]
