"""Residual streams as files: captured once, read by any SAE. docs/activations.md describes the format."""

from sts_fast.model.stored.folder import Activations
from sts_fast.model.stored.index import MODEL_FOLDER, is_activations

__all__ = ["MODEL_FOLDER", "Activations", "is_activations"]
