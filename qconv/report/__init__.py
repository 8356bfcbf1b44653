"""Renders the report document (format 2) for people and machines.

Pure functions of a plain dict: what a run measured is decided elsewhere. ``report.schema.json`` is the
published description of the document; every renderer takes a missing or null part for "not measured".
"""
