"""What a training did: recorded stats, summaries, plots, and measurements of a model."""
