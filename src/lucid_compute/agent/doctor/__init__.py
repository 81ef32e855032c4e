"""The doctor: tells a provider why no requests come, one check at a time, each failure with one fix."""
