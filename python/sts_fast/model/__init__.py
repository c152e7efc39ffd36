"""A language model read where SAEs read, or its activations as stored before."""
