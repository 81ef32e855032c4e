"""The agent: runs on a provider's machine, watches one inference server and its GPUs, and reports them."""
