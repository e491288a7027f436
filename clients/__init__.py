"""What runs at a client: scoring, domain models, calibration. The server side never imports it."""
