"""Prompts: templates with one slot, label words, the grammar of proposals, and the artefact."""
