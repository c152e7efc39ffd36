"""The user's data: rows of files, examples, sets, and the prompts made of them."""
