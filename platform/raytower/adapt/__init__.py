"""Training without labels: `raytower pairs` makes pairs of a corpus's structure, `raytower adapt` trains by them."""
