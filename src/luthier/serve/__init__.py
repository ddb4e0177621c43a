"""Serving: requests that come and go share one model, and each is answered as if it were alone."""
