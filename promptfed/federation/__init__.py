"""The round engine: messages and their codec, transports, event log and checkpoint."""
