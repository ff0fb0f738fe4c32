"""causal_padded_flexattn in other libraries, and on several GPUs."""
