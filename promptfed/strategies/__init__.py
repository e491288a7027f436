"""Server-side methods, one file each, named for its paper; `base` is what they share."""
