"""What the layouts of kernels are chosen for; elsewhere some programs have more to do than others."""

SMS = 132  # of an H100, each with room for a few programs
