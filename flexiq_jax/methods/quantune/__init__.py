"""QuantuneV2 (arXiv 2501.07161): precision by two runs of a model and the form of its graph."""

from flexiq_jax.methods.quantune.method import Quantune

__all__ = ["Quantune"]
