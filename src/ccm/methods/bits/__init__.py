"""Fewer bits: memories whose slots are held as codes between the turns."""
