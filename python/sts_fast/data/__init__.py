"""What the user gave: rows of files, examples, sets, and the prompts made of them."""
