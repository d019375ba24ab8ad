"""`m3 serve`: one model, kept warm behind an HTTP API."""
