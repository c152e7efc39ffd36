"""Sparse autoencoders, as read from the files people share."""

from sts_fast.sae.load import load_sae
from sts_fast.sae.sae import SAE

__all__ = ["SAE", "load_sae"]
