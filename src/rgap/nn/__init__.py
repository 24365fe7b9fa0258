"""What a network is to the attack: layers as trilinear forms, activations, losses, and the trace of a module."""
