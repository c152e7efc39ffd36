"""Residual streams as files: captured once, read again by every SAE. docs/activations.md describes the format."""

from sts_fast.model.stored.folder import NO_PASSES, Activations
from sts_fast.model.stored.index import MODEL_FOLDER, is_activations
from sts_fast.model.stored.writing import capture_activations

__all__ = ["MODEL_FOLDER", "NO_PASSES", "Activations", "capture_activations", "is_activations"]
