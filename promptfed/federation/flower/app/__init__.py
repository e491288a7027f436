"""The Flower app of promptfed, as a folder that `flwr run` takes."""
