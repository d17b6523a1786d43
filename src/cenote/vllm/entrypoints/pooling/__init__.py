"""Requests of pooling models."""
