"""From weights to codes: pure functions of tensors."""
