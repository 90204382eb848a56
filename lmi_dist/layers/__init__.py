"""The nouns that models share: linear, norm, rotary, attention, mlp, embedding. Each is built from weights by name."""
