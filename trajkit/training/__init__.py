"""Beside a PyTorch training: the recorder, and the evaluation of weights by the user's own function."""
