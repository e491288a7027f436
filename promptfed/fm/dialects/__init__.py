"""What kinds of OpenAI-compatible server there are, and how each is asked. One file a kind."""
