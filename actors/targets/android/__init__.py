"""Phones, reached through an adb server."""
