"""Interfaces of older systems, kept for those who come from there: handler pairs, jobs, headers of PikaBus."""
