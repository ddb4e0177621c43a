"""Merging: several models, or several LoRAs, of one base into one."""
