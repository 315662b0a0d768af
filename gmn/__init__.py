"""gmn: make trained neural networks smaller."""
