"""What a training did: a table, a summary, pictures and measurements of gradients and minima.

These modules read the stats of an integration and know nothing of how they came about.
"""
