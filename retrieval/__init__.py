"""Text encoders and, later, the clients' local indices."""
