"""The doctor: shows a provider why a node gets no requests, one check at a time, with one fix for each failure."""
