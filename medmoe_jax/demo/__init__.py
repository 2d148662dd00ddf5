"""The embedded demonstration: tiny checkpoints, phantom studies and the whole path on them."""
