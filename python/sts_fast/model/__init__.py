"""A language model read at the SAEs' hooks, or its stored activations."""
