"""Training without labels: `raytower pairs` makes pairs of a corpus's own structure, `raytower adapt` trains by them."""
