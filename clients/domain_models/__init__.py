"""Domain models: small models that a client trains at home. One file a kind; `base` says what each can do."""
