"""From gradients to inputs: the paper's equations on a traced network, whatever sent the gradients."""
