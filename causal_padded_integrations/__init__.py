"""causal_padded_flexattn in other libraries: each module imports its library when it is used."""
