"""Conversations over HTTP: many sessions on few rows, kept on disk."""
