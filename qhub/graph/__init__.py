"""Networks as graphs (images, text classification, speech, …): which tensors are rounded, and every form such a network is kept in."""
