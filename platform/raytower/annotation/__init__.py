"""A file in, the same file out with negatives, labels or scores: mining, classifying, similarity of pairs."""
