"""The command `dicomnode`: what a person at a terminal needs of this package."""
