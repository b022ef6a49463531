"""Errors, the registry, files written whole, checks of folders, access to the hub, properties of the machine."""
