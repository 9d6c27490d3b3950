"""Our kernels inside other people's code: each module here is for one library."""
