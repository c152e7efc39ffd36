"""Profiles: what one SAE makes of one set of prompts, a sparse row a prompt, and the arithmetic on it."""
