"""What was let out under differential privacy, and what it amounts to."""
