"""Residual streams as files: captured once, read again by every SAE. docs/activations.md describes the format."""

from sts_fast.activations.folder import NO_PASSES, Activations
from sts_fast.activations.index import MODEL_FOLDER, is_activations
from sts_fast.activations.writing import capture_activations

__all__ = ["MODEL_FOLDER", "NO_PASSES", "Activations", "capture_activations", "is_activations"]
