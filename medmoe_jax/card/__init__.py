"""Model cards: what a model is, from what its folder and its evaluation recorded."""
