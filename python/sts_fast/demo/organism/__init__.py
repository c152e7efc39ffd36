"""The embedded world: a small language model with in-context learning, its SAE, its abilities, and real fine-tuning.

Model, SAE and data have the formats of a user's: a Hugging Face folder, a SAELens folder, examples as text.
"""

from sts_fast.demo.organism.model import load_model, model_folder, one_thread, sae_folder, weights_folder
from sts_fast.demo.organism.training import FIGURES_FILE, train
from sts_fast.demo.organism.tuning import Abilities, fine_tune, measure
from sts_fast.demo.organism.world import DOMAINS, WORLD, Domain, World, examples

__all__ = [
    "DOMAINS",
    "FIGURES_FILE",
    "WORLD",
    "Abilities",
    "Domain",
    "World",
    "examples",
    "fine_tune",
    "load_model",
    "measure",
    "model_folder",
    "one_thread",
    "sae_folder",
    "train",
    "weights_folder",
]
