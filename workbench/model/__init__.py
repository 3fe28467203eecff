"""Configurations, the decoder, counts and generation."""
