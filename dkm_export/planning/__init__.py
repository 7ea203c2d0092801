"""Which bits, dim and groups each layer gets, for a budget of bytes."""
