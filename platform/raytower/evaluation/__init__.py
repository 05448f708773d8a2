"""Evaluating retrieval, mining hard negatives, classifying by retrieval, scoring pairs; shared recall-then-rerank."""
