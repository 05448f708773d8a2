"""Ray Train jobs: the two-tower retriever and the cross-encoder reranker."""
