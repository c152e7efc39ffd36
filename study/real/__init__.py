"""A real instruct model, real training sets, and what each of them really changed."""
